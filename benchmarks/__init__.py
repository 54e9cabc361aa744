"""Benchmarks of this package against other implementations and against the machine.

``python -m benchmarks`` runs the list in ``runs.yaml``. Not part of the installed package.
"""

# ours: the model of the config. detr: the same without the layer residual. plain: the same without
# acceleration, see peers.py. hf: transformers.DetrForObjectDetection.
PEERS = ("ours", "detr", "plain", "hf")
VARIABLES = ("tokens", "queries", "batch", "objects")  # the variables of scaling.py
