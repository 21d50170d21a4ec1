"""What a person is told while something runs."""

from __future__ import annotations

import logging
import sys

from torch import distributed


def say(line: str, *, show: bool = False) -> bool:
    """Logs a line to the logger "saft_kernels", at INFO; returns whether it went anywhere.

    Args:
        line: The line.
        show: Where nobody has set logging up, print it to stderr, once for all ranks of torch.distributed.
    """
    logger = logging.getLogger("saft_kernels")
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
        return True
    if (
        show
        and not logger.level
        and not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
    ):
        print(line, file=sys.stderr, flush=True)
        return True
    return False
