"""``congruence``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_matches, exactly
from torch import Tensor
from torch.nn.functional import normalize

from kdkernels.ops.congruence import congruence
from kdkernels.ops.congruence import reference as congruence_reference
from kdkernels.ops.congruence import triton as congruence_triton
from kdkernels.ops.congruence.plan import Coefficients

from . import FULL_PRECISION, draw, laid_out, ops


def compare(
    device: str,
    images: int,
    positions: int,
    widths: tuple[int, int],
    coefficients: tuple[float, ...],
    form: str,
    dtype: torch.dtype = torch.float32,
    wanted: tuple[bool, bool] = (True, True),
) -> None:
    x, y = (normalize(draw(images * positions, width, device=device, dtype=dtype)) for width in widths)
    x[-1] = 0
    y[0] = 0
    x, y = x.requires_grad_(wanted[0]), laid_out(y, "transposed").requires_grad_(wanted[1])

    def run(x: Tensor, y: Tensor) -> Tensor:
        return congruence(x, y, positions=positions, coefficients=coefficients, form=form, backend="triton")

    def expect(x: Tensor, y: Tensor) -> Tensor:
        return congruence_reference.gram_form(x, y, positions, Coefficients(*coefficients))

    if not any(wanted):
        assert_close(run(x, y), expect(*exactly(x, y)), "loss")
        return
    assert_matches(run, expect, x, y)


@pytest.mark.parametrize("dtype", FULL_PRECISION)
@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize(
    "coefficients",
    [(1.0, 0.0, 0.0, 1.0), (0.7, 0.5, -0.3, 0.2), (0.0, 1.0, 0.0, 0.0), (0.0, 0.5, 2.0, 0.0), (0.5, 0.0, 1.0, 0.0)],
)
def test_congruence(device: str, dtype: torch.dtype, form: str, coefficients: tuple[float, ...]) -> None:
    compare(device, 5, 4, (17, 9), coefficients, form, dtype)


@pytest.mark.parametrize("form", ["gram", "feature", "auto"])
@pytest.mark.parametrize(
    ("images", "positions", "widths"),
    [(1, 4, (3, 2)), (7, 1, (5, 19)), (1, 1, (3, 70)), (35, 2, (66, 1)), (9, 9, (4, 4))],
)
def test_congruence_of_odd_shapes(device: str, form: str, images: int, positions: int, widths: tuple[int, int]) -> None:
    compare(device, images, positions, widths, (0.7, 0.5, -0.3, 0.2), form)


def test_congruence_in_strips(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(congruence_triton, "STRIP_ROWS", 16)
    monkeypatch.setattr(congruence_triton, "STRIP_ELEMENTS", (2**8, 2**8))
    compare(device, 9, 5, (11, 6), (0.7, 0.5, -0.3, 0.2), "gram")
    compare(device, 40, 2, (11, 6), (0.0, 0.0, 1.0, 0.0), "gram")


@pytest.mark.parametrize("wanted", [(True, True), (False, False)], ids=str)
def test_congruence_split_along_its_depth(
    device: str, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(congruence_triton, "SPLIT_DEPTH", 16)
    compare(device, 13, 4, (19, 40), (0.7, 0.0, -0.3, 0.2), "feature", wanted=wanted)


def test_congruence_of_mixed_forms(device: str) -> None:
    """Here the plan gives each norm its own form. Pure forms are used in its place."""
    compare(device, 12, 4, (4, 200), (1.0, 0.0, 0.0, 1.0), "auto", wanted=(True, False))


def test_no_tensor_of_the_size_of_all_pairs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the launcher's allocations with kernels that do nothing."""
    rows, sizes = 4096, []
    new_empty = Tensor.new_empty

    def recording(self: Tensor, *size, **options) -> Tensor:
        result = new_empty(self, *size, **options)
        sizes.append(result.numel())
        return result

    class Idle:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: None

    monkeypatch.setattr(congruence_triton, "_product_kernel", Idle())
    monkeypatch.setattr(Tensor, "new_empty", recording)
    x = torch.zeros(rows, 8, device=device)
    ops.congruence(x, x, 16, [0.7, 0.5, -0.3, 0.2], [False] * 3, True, True)
    assert rows * 128 <= max(sizes) <= rows**2 // 8


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_congruence_of_broken_rows(device: str, form: str) -> None:
    for place in range(2):
        rows = [draw(20, 7, device=device) for _ in range(2)]
        rows[place][3, 2] = float("nan")
        for coefficients in ((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)):
            loss = congruence(*rows, positions=4, coefficients=coefficients, form=form, backend="triton")
            assert loss.isnan()
