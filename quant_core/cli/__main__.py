"""``python -m quant_core.cli`` is ``calibquant``."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
