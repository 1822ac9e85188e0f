"""The CUDA operators on the CPU, in place of the native ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kdkernels import native

from . import build


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reason = native.why_not(torch.device("cpu")) or build.why_not()
    if reason is not None:
        pytest.skip(reason)
    build.load()
    monkeypatch.setattr(native, "ops", torch.ops.kdkernels_emulated)
    monkeypatch.setattr(native, "launches", lambda _: True)
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
