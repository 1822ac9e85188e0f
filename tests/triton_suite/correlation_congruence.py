"""``correlation_congruence``"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, assert_matches, exactly

import kdkernels
from kdkernels.ops.congruence import triton as congruence_triton

from . import FULL_PRECISION, draw, laid_out

every_kernel = pytest.mark.parametrize("kernel", ["taylor_rbf", "rbf", "bilinear", "mmd"])


def compare(
    device: str,
    n: int,
    widths: tuple[int, int],
    wanted: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
    **settings,
) -> None:
    x, y = (draw(n, width, device=device, dtype=dtype) / math.sqrt(width) for width in widths)
    x[-1] = x[0]
    y[0] = 0
    x, y = x.requires_grad_(wanted[0]), laid_out(y, "transposed").requires_grad_(wanted[1])

    def loss_of(backend: str):
        return lambda s, t: kdkernels.correlation_congruence_loss(s, t, backend=backend, **settings)

    if not any(wanted):
        assert_close(loss_of("triton")(x, y), loss_of("reference")(*exactly(x, y)), "loss")
        return
    assert_matches(loss_of("triton"), loss_of("reference"), x, y)


@pytest.mark.parametrize("normalize", [True, False], ids=["unit rows", "raw rows"])
@pytest.mark.parametrize("dtype", FULL_PRECISION)
@every_kernel
def test_correlation_congruence(device: str, kernel: str, dtype: torch.dtype, normalize: bool) -> None:
    compare(device, 21, (17, 9), dtype=dtype, kernel=kernel, normalize=normalize)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_correlation_congruence_of_orders(device: str, order: int) -> None:
    compare(device, 9, (5, 7), order=order, gamma=0.7, reduction="sum")


@every_kernel
@pytest.mark.parametrize(("n", "widths"), [(3, (1, 40)), (70, (6, 3))], ids=str)
def test_correlation_congruence_of_odd_shapes(device: str, kernel: str, n: int, widths: tuple[int, int]) -> None:
    compare(device, n, widths, kernel=kernel)


@every_kernel
def test_correlation_congruence_in_strips(device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(congruence_triton, "STRIP_ROWS", 16)
    monkeypatch.setattr(congruence_triton, "STRIP_ELEMENTS", (2**8, 2**8))
    compare(device, 41, (7, 5), kernel=kernel, normalize=False)
