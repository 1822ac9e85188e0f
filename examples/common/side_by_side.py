"""Training of independent networks side by side, in several processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, connection, get_context, parent_process

import torch


def run(jobs: int, train: Callable[..., object], calls: Sequence[tuple], begin: Callable[[], None]) -> None:
    """Call ``train`` with the arguments in each of ``calls``, ``jobs`` of them at a time, and wait for all.

    ``train`` writes a checkpoint. Its result is dropped, because the caller reads the checkpoint. Every process calls
    ``begin`` first.
    """
    # Not with fork, because the child would wait for OpenMP threads that only its parent has.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (torch.get_num_threads(), begin)) as pool:
        try:
            for done in as_completed([pool.submit(_call, train, arguments) for arguments in calls]):
                done.result()
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def _call(train: Callable[..., object], arguments: tuple) -> None:
    train(*arguments)


def _begin(threads: int, begin: Callable[[], None]) -> None:
    torch.set_num_threads(threads)
    begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent was killed. The next run would otherwise write the same checkpoints at the same time."""
    connection.wait([parent_process().sentinel])
    os._exit(1)
