"""``python -m miti_detr.cli``, for use without the console script."""

import sys

from miti_detr.cli.main import main

sys.exit(main())
