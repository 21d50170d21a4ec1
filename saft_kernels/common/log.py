"""What a person is told while something runs."""

from __future__ import annotations

import logging
import sys

from torch import distributed


def say(line: str, *, show: bool = False) -> bool:
    """Logs a line to the logger "saft_kernels", at INFO; returns whether it went anywhere.

    Args:
        line: The line.
        show: Where the logger is not at INFO, print it to stderr, once for all ranks of torch.distributed; not when it
            has a level of its own, or logging is disabled.
    """
    logger = logging.getLogger("saft_kernels")
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():  # without any, Python shows warnings alone
        logger.info(line)
        return True
    if (
        show
        and not logger.level
        and logger.manager.disable < logging.INFO
        and not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
    ):
        print(line, file=sys.stderr, flush=True)
        return True
    return False
