"""``congruence`` in every form against a loop over pairs, for rows of any norm, and the choice of the form."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import assert_close, loss_and_gradients
from torch import Tensor

from kdkernels import native
from kdkernels.ops.congruence import congruence
from kdkernels.ops.congruence.plan import (
    FEATURE,
    FORMS,
    GRAM,
    MIXED,
    Coefficients,
    Plan,
    Problem,
    candidates,
    choose_form,
    launches,
    make_plans,
    multiply_adds,
)

FULL, INTRA, SAME, DIAGONAL = torch.eye(4).tolist()
every_form = pytest.mark.parametrize("form", FORMS)


def exact(x: Tensor, y: Tensor, positions: int, coefficients) -> tuple[Tensor, list[Tensor]]:
    """Return the sum over pairs in float64, and its gradients 4 (W ∘ D) X and -4 (W ∘ D) Y."""
    x, y = x.detach().double(), y.detach().double()
    full, intra, same, diagonal = coefficients
    loss, slope = 0.0, torch.zeros(len(x), len(x), dtype=torch.float64)
    for r, s in product(range(len(x)), repeat=2):
        weight = full + intra * (r // positions == s // positions) + same * (r % positions == s % positions)
        weight += diagonal * (r == s)
        difference = float(x[r] @ x[s] - y[r] @ y[s])
        loss += weight * difference**2
        slope[r, s] = 4 * weight * difference
    return torch.tensor(loss, dtype=torch.float64), [slope @ x, -slope @ y]


def agree(x: Tensor, y: Tensor, positions: int, coefficients, **settings) -> None:
    """Assert that loss and gradients equal the exact ones."""
    loss, gradients = loss_and_gradients(
        lambda x, y: congruence(x, y, positions=positions, coefficients=coefficients, **settings),
        x.requires_grad_(),
        y.requires_grad_(),
    )
    exact_loss, exact_gradients = exact(x, y, positions, coefficients)
    assert loss.dtype == x.dtype
    assert_close(loss, exact_loss, "loss")
    for gradient, correct in zip(gradients, exact_gradients, strict=True):
        assert_close(gradient, correct, "gradient")


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "coefficients",
    [FULL, INTRA, SAME, DIAGONAL, (1, 1, 1, 1), (0.3, 2, 0.7, 1.5), (1, -1, -1, 1), (0, 1, 2, 0)],
    ids=str,
)
def test_coefficients(backend, form, dtype, coefficients):
    agree(torch.randn(15, 4, dtype=dtype), torch.randn(15, 7, dtype=dtype), 5, coefficients, form=form, backend=backend)


@every_form
@pytest.mark.parametrize(
    ("rows", "positions", "x", "y"),
    [(5, 5, 1, 9), (6, 1, 40, 1), (65, 5, 3, 70), (57, 3, 17, 16), (129, 43, 33, 2)],
    ids=str,
)
def test_shapes(backend, form, rows, positions, x, y):
    agree(torch.randn(rows, x), torch.randn(rows, y), positions, (0.8, 0.5, 2, 0.3), form=form, backend=backend)


@every_form
def test_one_row(backend, form):
    x, y = torch.tensor([[3.0, 0.0, -4.0]]), torch.tensor([[1.0, 2.0]])
    assert congruence(x, y, coefficients=(1, 2, 3, 4), form=form, backend=backend) == 10 * (25 - 5) ** 2
    agree(x, y, 1, (1, 2, 3, 4), form=form, backend=backend)


@every_form
@pytest.mark.parametrize("rows", [600, 1030])
def test_many_rows(backend, form, rows):
    """There are more rows than one strip of the Gram matrices holds, and the last strip is short."""
    x, y = torch.randn(rows, 70, requires_grad=True), torch.randn(rows, 40, requires_grad=True)
    coefficients = (1.0, 0.4, -0.7, 0.5)

    def textbook(x: Tensor, y: Tensor) -> Tensor:
        squares, index = (x @ x.T - y @ y.T).square(), torch.arange(rows)
        image, position = index // 10, index % 10
        weight = coefficients[0] + coefficients[1] * (image[:, None] == image)
        weight = weight + coefficients[2] * (position[:, None] == position) + coefficients[3] * torch.eye(rows)
        return (squares * weight).sum()

    loss, gradients = loss_and_gradients(
        lambda x, y: congruence(x, y, positions=10, coefficients=coefficients, form=form, backend=backend), x, y
    )
    correct, of_textbook = loss_and_gradients(textbook, *(z.detach().double().requires_grad_() for z in (x, y)))
    assert_close(loss, correct, "loss")
    for gradient, expected in zip(gradients, of_textbook, strict=True):
        assert_close(gradient, expected, "gradient")


@pytest.mark.parametrize("sizes", [(6, 5, 5), (30, 5, 5), (12, 2, 40), (30, 5, 90), (12, 40, 3)], ids=str)
@pytest.mark.parametrize("grad_teacher", [False, True])
def test_auto_is_exact_whatever_it_picks(backend, sizes, grad_teacher):
    rows, width_x, width_y = sizes
    x, y = torch.randn(rows, width_x, requires_grad=True), torch.randn(rows, width_y, requires_grad=grad_teacher)
    coefficients = (1, 0.5, 2, 0.3)
    loss, gradients = loss_and_gradients(
        lambda x, y: congruence(x, y, positions=3, coefficients=coefficients, backend=backend), x, y
    )
    exact_loss, exact_gradients = exact(x, y, 3, coefficients)
    assert_close(loss, exact_loss, "loss")
    for gradient, correct in zip(gradients[: 1 + grad_teacher], exact_gradients, strict=False):
        assert_close(gradient, correct, "gradient")


@pytest.mark.parametrize("form", [GRAM, FEATURE, MIXED], ids=str)
@pytest.mark.parametrize("grad_x", [True, False])
def test_every_mixture_of_forms(form, grad_x):
    """The native operator computes each term in either space, independent of the cost model."""
    reason = native.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    x, y, coefficients = torch.randn(33, 4), torch.randn(33, 6), [1.3, 0.5, 2.0, 0.3]
    plan = Plan(form, FEATURE, GRAM)
    loss, gradient, _ = torch.ops.kdkernels.congruence(x, y, 3, coefficients, plan.codes, grad_x, False)
    exact_loss, (exact_gradient, _) = exact(x, y, 3, coefficients)
    assert_close(loss, exact_loss, "loss")
    if grad_x:
        assert_close(gradient, exact_gradient, "gradient")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.randn(12, 5, 1)}, ValueError, ["x", "N x d_S", "(12, 5, 1)"]),
        ({"y": torch.randn(11, 5)}, ValueError, ["y", "12", "11"]),
        ({"y": torch.randn(12, 5).double()}, TypeError, ["y", "float32", "float64"]),
        ({"x": torch.randn(12, 5).bfloat16(), "y": torch.randn(12, 5).bfloat16()}, TypeError, ["x", "bfloat16"]),
        ({"y": torch.randn(12, 5, device="meta")}, ValueError, ["y", "cpu", "meta"]),
        ({"positions": 5}, ValueError, ["positions", "12", "5"]),
        ({"positions": 0}, ValueError, ["positions", "positive integer", "0"]),
        ({"coefficients": (1, 2, 3)}, (TypeError, ValueError), ["coefficients", "(1, 2, 3)"]),
        ({"form": "tiles"}, ValueError, ["form", "feature", "'tiles'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_misuse(changes, error, words):
    arguments = {"x": torch.randn(12, 5), "y": torch.randn(12, 8), **changes}
    with pytest.raises(error) as raised:
        congruence(arguments.pop("x"), arguments.pop("y"), **arguments)
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"


# How a form is picked -------------------------------------------------------------------------------------------------


def test_feature_space_wins_for_large_batches():
    assert choose_form("auto", True, 8192, 256, 256, True, False) == FEATURE
    assert choose_form("auto", True, 64, 4096, 4096, True, False) == GRAM


@pytest.mark.parametrize("grads", list(product([True, False], repeat=2)), ids=str)
def test_auto_is_the_cheapest_candidate(grads):
    for rows, x, y in product((1, 16, 1000), (1, 30, 2048), (7, 512)):
        costs = {form: multiply_adds(form, rows, x, y, *grads) for form in candidates(True, grads[1])}
        assert costs[choose_form("auto", True, rows, x, y, *grads)] == min(costs.values())
        assert {choose_form("gram", True, rows, x, y, *grads), choose_form("feature", True, rows, x, y, *grads)} == {
            GRAM,
            FEATURE,
        }


CIFAR = ((16, 32), (32, 16), (64, 8))  # (channels, side) of LKD's stages


def plans_of_cifar(images, form="auto", target="cuda"):
    """Return the forms of the sum over all pairs at k = 4, with and without the cost of launches."""
    widths = [channels * (side // 4) ** 2 for channels, side in CIFAR]
    full = Coefficients(1.0, 0.0, 0.0, 1.0)
    problems = tuple(Problem(full, images * 16, 16, width, width, True, False) for width in widths)
    plans = make_plans(form, problems, target)
    return [plan.full for plan in plans], launches(plans, problems)


def test_launches_are_weighed_against_multiply_adds():
    """At the paper's batch, all stages share one form, although some would cost less in feature space."""
    assert plans_of_cifar(64, target="cpu")[0] == [GRAM, FEATURE, FEATURE]
    assert plans_of_cifar(64) == ([GRAM] * 3, 2)
    assert plans_of_cifar(65)[0] == [GRAM, FEATURE, FEATURE]  # 65 images have more than one strip
    assert plans_of_cifar(128) == ([FEATURE] * 3, 3)
    assert plans_of_cifar(64, "feature") == ([FEATURE] * 3, 3)
    assert plans_of_cifar(128, "gram") == ([GRAM] * 3, 2)


def test_no_candidate_is_idle():
    """Each candidate is the cheapest for some size. Otherwise its code would never run."""
    sizes = list(product((8, 64, 512), (2, 16, 128, 1024), (2, 16, 128, 1024), (True, False)))
    assert {choose_form("auto", True, *size, False) for size in sizes} == set(candidates(True, False))
