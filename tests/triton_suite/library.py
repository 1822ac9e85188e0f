"""The kernels of the backend "library", which process what PyTorch's matrix products compute."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_matches

import kdkernels
from kdkernels.ops import library, tuning
from kdkernels.ops.congruence import congruence

from . import draw


@pytest.fixture(params=[True, False], ids=["planes", "direct"])
def planes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "has_bfloat16_tensor_cores", lambda _: request.param)
    monkeypatch.setattr(tuning, "LIBRARY_STRIP", 2**9)


def test_library_of_congruence(device: str, planes: None) -> None:
    x, y = (draw(42, columns, device=device).requires_grad_() for columns in (13, 21))
    run = functools.partial(congruence, positions=3, coefficients=(1.0, 0.5, 2.0, 0.3), form="gram")
    assert_matches(functools.partial(run, backend="library"), functools.partial(run, backend="reference"), x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["taylor_rbf", "rbf", "bilinear"])
def test_library_of_correlation_congruence(device: str, planes: None, kernel: str, dtype: torch.dtype) -> None:
    x, y = (draw(41, columns, device=device, dtype=dtype).requires_grad_() for columns in (13, 21))
    run = functools.partial(kdkernels.correlation_congruence_loss, kernel=kernel, form="gram")
    assert_matches(functools.partial(run, backend="library"), functools.partial(run, backend="reference"), x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gram", "feature"])
def test_library_of_similarity_preserving(device: str, planes: None, form: str, dtype: torch.dtype) -> None:
    x, y = (draw(41, columns, device=device, dtype=dtype).requires_grad_() for columns in (13, 21))
    run = functools.partial(kdkernels.similarity_preserving_loss, form=form)
    assert_matches(functools.partial(run, backend="library"), functools.partial(run, backend="reference"), x, y)
