"""Other processes of tests, forked by a server that has imported what they need: those that may crash, and ranks."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

_context = multiprocessing.get_context("forkserver")  # it has imported everything, and run nothing yet
_IMPORTED = (
    "optimizer_runs",
    "training",
    "torch._dynamo",  # else the first step of every process would
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "saft_kernels.integrations",
)


@functools.cache
def _start_server(module: str) -> None:
    """Of the first module that asks. Python 3.11's does not look for what it preloads along sys.path."""
    _context.set_forkserver_preload([*_IMPORTED, module])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def isolated(function: Callable[..., None], *args: Any, timeout: float = 60) -> None:
    """Calls a function of a test module in another process; a crash or an error there is an AssertionError here."""
    _start_server(function.__module__)
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_report, args=(theirs, function, args))
    process.start()
    theirs.close()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{function.__name__}{args}: still running after {timeout} s")
    if process.exitcode:
        how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
        raise AssertionError(f"{function.__name__}{args}: ended by {how}")
    failed = ours.recv()
    assert failed == "", failed


def _report(connection: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function(*args)
        connection.send("")
    except BaseException:
        connection.send(traceback.format_exc()[-10_000:])
    os._exit(0)  # without the destructors of what may be broken


def run_ranks(function: Callable[[int, str], Any], count: int, folder: Path) -> list[Any]:
    """What a function of a test module returns on each of `count` ranks that gloo connects, from rank and folder.

    Raises:
        ProcessRaisedException: A rank failed; its traceback is the message. The others were ended.
    """
    _start_server(function.__module__)
    torch.multiprocessing.start_processes(
        _rank, (function, count, os.fspath(folder)), nprocs=count, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _rank(rank: int, function: Callable[[int, str], Any], count: int, folder: str) -> None:
    gc.freeze()  # optimizers look for wrapped models among all that Python collects: not among what was imported
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)  # ranks that wait for each other
    distributed.init_process_group("gloo", f"file://{folder}/ranks", limit, count, rank)
    torch.save(function(rank, folder), f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # not destroy_process_group(): torch 2.14 then aborts now and then, with gloo
