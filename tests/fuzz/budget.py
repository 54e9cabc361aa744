"""How many random inputs a property test tries."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.getenv("MITI_DETR_FUZZ_EXAMPLES", "20"))

# The same inputs in each run of the small budget, so that a failure can be repeated; a larger
# budget explores.
budget = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 20,
    suppress_health_check=list(HealthCheck),
)
