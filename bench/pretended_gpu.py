"""Pretend that the CPU is a GPU, so that the scripts for GPUs can be rehearsed. Their times mean nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "Pretended H200"


class _Event:
    def __init__(self, **_: object) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * max(other.time - self.time, 1e-9)


class _Graph:
    def replay(self) -> None:
        """A CPU records no graph."""


class _Stream:
    def wait_stream(self, _: object) -> None: ...


@contextlib.contextmanager
def _block(*_: object, **__: object) -> Iterator[None]:
    yield


def install() -> None:
    """Replace what the scripts use of ``torch.cuda``."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 0
    cuda.get_device_name = lambda *_: NAME
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)
    cuda.mem_get_info = lambda *_: (139 * 2**30, 141 * 2**30)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(cuda, name, lambda *_: 0)
    cuda.Event, cuda.CUDAGraph, cuda.Stream = _Event, _Graph, _Stream
    cuda.stream = cuda.graph = _block
    cuda.current_stream = lambda *_: _Stream()
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
