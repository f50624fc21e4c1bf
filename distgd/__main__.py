"""`python -m distgd` is the command `distgd`."""

from __future__ import annotations

import sys

from distgd.cli import main

if __name__ == "__main__":
    sys.exit(main())
