"""``python -m miti_detr.cli``, for where the console script is not installed."""

import sys

from miti_detr.cli.main import main

sys.exit(main())
