"""`python -m orchestrator` is `moegrid`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main())
