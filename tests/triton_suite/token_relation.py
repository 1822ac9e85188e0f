"""``token_relation``"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import assert_close, assert_matches, loss_and_gradients
from torch import Tensor

import kdkernels

from . import FULL_PRECISION, draw

COMPARISONS = {
    "mse": {"comparison": "mse", "clip": "both"},
    "hinge": {"comparison": "hinge", "margin": 0.1, "clip": "teacher"},
    "kl": {"comparison": "kl", "temperature": (0.3, 0.4)},
    "cross_entropy": {"comparison": "cross_entropy", "temperature": 0.4, "clip": "teacher_only"},
}
RARE = pytest.mark.slow
every_comparison = pytest.mark.parametrize("settings", COMPARISONS.values(), ids=COMPARISONS)
one_comparison = pytest.mark.parametrize(
    "settings",
    [pytest.param(value, id=name, marks=[] if name == "kl" else RARE) for name, value in COMPARISONS.items()],
)


def check(*inputs: Tensor, **settings: object) -> None:
    """Compare with the reference: student and teacher, or the queries and keys of both."""

    def run(*tensors: Tensor, backend: str) -> Tensor:
        half = len(tensors) // 2
        student, teacher = (x[0] if half == 1 else x for x in (tensors[:half], tensors[half:]))
        return kdkernels.token_relation_loss(student, teacher, backend=backend, **settings)

    triton, reference = (functools.partial(run, backend=backend) for backend in ("triton", "reference"))
    assert_matches(triton, reference, *(x.requires_grad_() for x in inputs))


@every_comparison
@pytest.mark.parametrize("dtype", FULL_PRECISION)
def test_token_relations(device: str, dtype: torch.dtype, settings: dict) -> None:
    """More than one strip of rows, and more than one tile of columns and of channels."""
    check(draw(1, 67, 18, device=device, dtype=dtype), draw(1, 67, 5, device=device, dtype=dtype), **settings)


@one_comparison
@pytest.mark.parametrize("layout", [{"heads": 2}, {"axis": "channels"}, {"normalize": False}], ids=str)
def test_token_relations_of_maps_with_a_mask(device: str, settings: dict, layout: dict) -> None:
    """A mask may leave out all tokens of an image. Masked tokens may be NaN."""
    mask = torch.rand(3, 3, 4, device=device) < 0.7
    mask[1], mask[0, 0] = False, True
    maps = [
        draw(3, 6, 3, 4, device=device),
        draw(3, 6, 3, 4, device=device).contiguous(memory_format=torch.channels_last),
    ]
    gone = maps[0].masked_fill(~mask[:, None], torch.nan)
    found, expected = (
        loss_and_gradients(
            functools.partial(kdkernels.token_relation_loss, mask=mask, backend=backend, **layout, **settings),
            *(x.requires_grad_() for x in inputs),
        )
        for backend, inputs in (("triton", (gone, maps[1])), ("reference", [x.double() for x in maps]))
    )
    for result, exact in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert_close(result, exact)
    assert not found[1][0][:, :, ~mask[1]].isnan().any()


@one_comparison
def test_token_relations_over_the_batch(device: str, settings: dict) -> None:
    """The tokens of all images of a map have no common stride."""
    check(draw(3, 4, 2, 3, device=device), draw(3, 6, 5, device=device), across="batch", **settings)


@one_comparison
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=RARE)])
def test_token_relations_of_queries_and_keys(device: str, settings: dict, masked: bool) -> None:
    """An image may have no keys."""
    mask = torch.rand(2, 7, device=device) < 0.7, torch.rand(2, 19, device=device) < 0.7
    mask[1][1] = False
    shapes = (2, 7, 6), (2, 19, 6), (2, 7, 8), (2, 19, 8)
    inputs = [0.5 * draw(*shape, device=device) for shape in shapes]
    check(*inputs, mask=mask if masked else None, normalize=False, **settings)


@pytest.mark.parametrize("layout", [{}, {"heads": 2, "axis": "channels", "across": "batch"}], ids=str)
def test_token_relations_in_feature_form(device: str, layout: dict) -> None:
    mask = torch.rand(2, 9, device=device) < 0.7
    check(draw(2, 9, 6, device=device), draw(2, 9, 6, device=device), form="feature", mask=mask, **layout)


@every_comparison
def test_token_relations_of_nan_and_of_huge_and_tiny_tokens(device: str, settings: dict) -> None:
    """A dead token has relation 0. Products of rows neither overflow nor underflow."""
    scales = torch.tensor([0, 1e30, 1e-10, 1], device=device)[:, None]
    student, teacher = scales * draw(1, 4, 5, device=device), draw(1, 4, 5, device=device)
    check(student, teacher, **settings)
    student.detach()[0, 3, 2] = torch.nan
    loss = kdkernels.token_relation_loss(student, teacher, backend="triton", **settings)
    assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_token_relations_in_half_precision(device: str, dtype: torch.dtype) -> None:
    check(draw(1, 20, 6, device=device, dtype=dtype), draw(1, 20, 9, device=device, dtype=dtype), **COMPARISONS["kl"])


@pytest.mark.parametrize("comparison", ["kl", pytest.param("cross_entropy", marks=RARE)])
def test_contrastive_relations(device: str, comparison: str) -> None:
    """The softmaxes of rows and of columns, of different numbers of rows and columns."""
    settings = {"student_scale": 3.0, "teacher_scale": 2.0, "comparison": comparison}
    triton, reference = (
        functools.partial(kdkernels.contrastive_relation_loss, backend=backend, **settings)
        for backend in ("triton", "reference")
    )
    shapes = (9, 6), (70, 6), (9, 4), (70, 4)
    assert_matches(triton, reference, *(draw(*shape, device=device).requires_grad_() for shape in shapes))
