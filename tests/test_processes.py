"""Other processes of tests: what fails there fails the test, and no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from processes import run_ranks
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


def raise_on_one(rank: int, _: str) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    time.sleep(600)


def die_on_one(rank: int, _: str) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_rank_that_raises(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)Process 1 .*in raise_on_one.*ValueError: on purpose"):
        run_ranks(raise_on_one, 2, tmp_path)
    assert multiprocessing.active_children() == []


def test_a_rank_that_dies(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        run_ranks(die_on_one, 2, tmp_path)
    assert multiprocessing.active_children() == []
