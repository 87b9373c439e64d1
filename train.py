"""`accelerate launch train.py --config FILE [key=value ...]`: the command line, for launchers that want a file."""

import sys

from mixres.cli import main

if __name__ == "__main__":
    sys.exit(main())
