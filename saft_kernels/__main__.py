"""`python -m saft_kernels`: the command `saft-kernels`; by itself versions, and which backends run, or why not."""

import sys

from .cli.main import main
from .cli.report import report

__all__ = ["main", "report"]

if __name__ == "__main__":
    sys.exit(main())
