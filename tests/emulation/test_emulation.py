"""Tests of the emulation: without a barrier, a kernel gives other results in some order of its threads."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from .build import ORDERS, load, set_order


def run(name: str, order: str, *, wait: bool) -> Tensor | None:
    set_order(order, seed=torch.randint(2**31, ()).item())
    out = torch.zeros(64)
    run_example = load().run_example
    run_example.restype = ctypes.c_bool
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (inputs, out))
    return out if run_example(name.encode(), wait, *pointers) else None


inputs = torch.arange(64.0)


@pytest.mark.parametrize(
    ("name", "turns"), [("neighbour", 1), ("rotation", 3), ("copy", 0)], ids=["neighbour", "rotation", "copy"]
)
def test_a_missing_barrier_is_found(name: str, turns: int) -> None:
    for order in ORDERS:
        assert torch.equal(run(name, order, wait=True), inputs.roll(-turns))
    assert not all(torch.equal(run(name, order, wait=False), inputs.roll(-turns)) for order in ORDERS)


def test_a_barrier_that_some_threads_miss_is_found() -> None:
    assert run("deadlock", "forward", wait=True) is None
