"""`python -m mixres`, and `accelerate launch -m mixres --config FILE` where there is no `train.py`."""

import sys

from mixres.cli import main

if __name__ == "__main__":
    sys.exit(main())
