"""``congruence`` in CUDA, emulated, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

from kdkernels.ops.congruence import congruence

from . import build

RELATIONS = (0.7, 0.5, -0.3, 0.2)


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, dtype=dtype)).requires_grad_()


def check(x: Tensor, y: Tensor, positions: int, coefficients: tuple[float, ...], form: str) -> None:
    def run(x: Tensor, y: Tensor, form: str = form, backend: str = "native") -> Tensor:
        return congruence(x, y, positions=positions, coefficients=coefficients, form=form, backend=backend)

    assert_matches(run, lambda x, y: run(x, y, "gram", "reference"), x, y)


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize(
    ("count", "x_width", "y_width", "positions"),
    [(1, 1, 1, 1), (12, 5, 3, 4), (66, 36, 20, 6), (70, 68, 130, 14), (130, 17, 40, 10)],
)
def test_sizes(order: str, form: str, count: int, x_width: int, y_width: int, positions: int) -> None:
    check(rows(count, x_width), rows(count, y_width), positions, RELATIONS, form)


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_float64(form: str) -> None:
    check(rows(70, 20, torch.float64), rows(70, 33, torch.float64), 5, RELATIONS, form)


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize("coefficients", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)])
def test_one_sum_at_a_time(form: str, coefficients: tuple[float, ...]) -> None:
    check(rows(24, 8), rows(24, 12), 4, coefficients, form)


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize("learning", [(True, False), (False, True)])
def test_gradients_where_wanted(form: str, learning: tuple[bool, bool]) -> None:
    x, y = rows(24, 8), rows(24, 12)
    x.requires_grad_(learning[0])
    y.requires_grad_(learning[1])
    check(x, y, 4, RELATIONS, form)
    with torch.no_grad():
        alone = congruence(x, y, positions=4, coefficients=RELATIONS, form=form, backend="native")
        correct = congruence(x, y, positions=4, coefficients=RELATIONS, form="gram", backend="reference")
        assert_close(alone, correct)


def test_strips_of_a_large_matrix() -> None:
    """There are more rows than one strip of D holds, and the last strip is short."""
    check(rows(1100, 4), rows(1100, 3).detach(), 2, RELATIONS, "gram")


def test_split_depth() -> None:
    check(rows(1100, 9), rows(1100, 6).detach(), 1, (1, 0, 0, 0), "feature")


def test_close_networks_keep_their_digits() -> None:
    """In the Gram form, only the entries of D cancel."""
    x = rows(64, 32)
    y = torch.nn.functional.normalize(x + 1e-3 * torch.randn(64, 32)).detach()
    loss, (gradient, _) = loss_and_gradients(lambda x, y: congruence(x, y, form="gram", backend="native"), x, y)
    exact, (correct, _) = loss_and_gradients(
        lambda x, y: congruence(x, y, form="gram", backend="reference"), *exactly(x, y)
    )
    assert abs(loss / exact - 1) < 1e-3
    assert (gradient - correct).norm() < 1e-3 * correct.norm()


def test_tf32_where_permitted(request: pytest.FixtureRequest) -> None:
    def run() -> list[Tensor]:
        loss, gradients = loss_and_gradients(lambda x, y: congruence(x, y, form="gram", backend="native"), x, y)
        return [loss, *gradients]

    x, y = rows(70, 20), rows(70, 33)
    accurate = run()
    request.getfixturevalue("permit_tf32")
    rounded = run()
    assert not torch.equal(rounded[1], accurate[1])  # losses, which are single numbers, may be equal
    for result, exact in zip(rounded, accurate, strict=True):
        assert relative_error(result, exact) < 2.0**-14


def test_the_feature_form_needs_more_than_tf32(request: pytest.FixtureRequest) -> None:
    def run() -> tuple[Tensor, list[Tensor | None]]:
        return loss_and_gradients(lambda x, y: congruence(x, y, form="feature", backend="native"), x, y)

    x, y = rows(70, 20), rows(70, 33)
    loss, gradients = run()
    request.getfixturevalue("permit_tf32")
    again, others = run()
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_nan_gives_nan(form: str) -> None:
    x = rows(70, 8).detach()
    x[65, 7] = torch.nan
    assert congruence(x, rows(70, 8).detach(), form=form, backend="native").isnan()


@pytest.mark.parametrize(("form", "launches"), [("gram", 3), ("feature", 4)])
def test_launches(form: str, launches: int) -> None:
    congruence(rows(64, 8), rows(64, 8).detach(), form=form, backend="native")
    assert build.launches() == launches


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_reruns_are_bitwise_equal_whatever_the_order(form: str) -> None:
    x, y = rows(130, 20), rows(130, 9)
    results = []
    for order in build.ORDERS:
        build.set_order(order)
        results.append(loss_and_gradients(lambda x, y: congruence(x, y, form=form, backend="native"), x, y))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(map(torch.equal, gradients, results[0][1]))
