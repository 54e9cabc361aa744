"""The benchmark behind ``miti-detr bench``."""

# ours: as configured; detr: the same without the layer residual; plain: DETR as it was written in
# 2020, see plain.py; hf: transformers.DetrForObjectDetection
SIDES = ("ours", "detr", "plain", "hf")
TASKS = ("model", "inference", "training", "data", "evaluation")
VARIABLES = ("tokens", "queries", "batch", "objects")  # what cost grows with
PRECISIONS = ("float32", "bfloat16", "float16")
