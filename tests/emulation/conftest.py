"""Run the CUDA operators on the CPU in place of the native ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from kdkernels import native
from kdkernels.ops.congruence import plan

from . import build


def of_emulated(backend: str, tensor: torch.Tensor) -> plan.Target:
    """Choose forms for the native kernels as on a GPU."""
    return "cuda" if backend == "native" else plan.target_of(backend, tensor)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reason = native.why_not(torch.device("cpu")) or build.why_not()
    if reason is not None:
        pytest.skip(reason)
    build.load()
    monkeypatch.setattr(native, "ops", torch.ops.kdkernels_emulated)
    for room in ("congruence", "correlation_congruence", "local_correlation"):
        monkeypatch.setattr(importlib.import_module(f"kdkernels.ops.{room}"), "target_of", of_emulated)
    build.launches()
    yield
    build.set_order("forward")


@pytest.fixture
def permit_tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=build.ORDERS)
def order(request: pytest.FixtureRequest, seed: int) -> str:
    build.set_order(request.param, seed)
    return request.param
