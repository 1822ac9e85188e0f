"""Masks of rows: a masked batch has the value and the gradients of the batch without the padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from helpers import DTYPES, assert_close, relative_error
from torch import Tensor

import kdkernels
from kdkernels import nn

cckd = functools.partial(functools.partial, kdkernels.correlation_congruence_loss)


def cross_layer(student: Tensor, teacher: Tensor, mask: Tensor | None = None, **settings: object) -> Tensor:
    weights = torch.tensor([[0.3], [0.6]], dtype=student.dtype).expand(len(student), 2, 1)
    return kdkernels.cross_layer_mse([[student], [2 * student]], 2 * [[teacher]], weights, mask=mask, **settings)


def of_matrices(student: Tensor, teacher: Tensor, mask: Tensor | None = None, **settings: object) -> Tensor:
    a, b = kdkernels.similarity_matrices([student, teacher], mask=mask, **settings)
    return (a - b).square().sum()


def stages(student: Tensor, teacher: Tensor, mask: Tensor | None = None, **settings: object) -> Tensor:
    return kdkernels.attention_transfer_loss([student, student.mT], [teacher, teacher.mT], mask=mask, **settings)


class Masked(NamedTuple):
    """A function of student, teacher and mask, and the shapes of a sample of each network."""

    function: Callable[..., Tensor]
    student: tuple[int, ...] = (6,)
    teacher: tuple[int, ...] = (9,)


MAPS = ((3, 4, 4), (5, 2, 4))
OF_ONE_WIDTH = ((3, 4, 4), (3, 2, 4))
FUNCTIONS = {
    "taylor_rbf": Masked(cckd()),
    "taylor_rbf, raw": Masked(cckd(normalize=False, order=3)),
    "taylor_rbf, sum": Masked(cckd(reduction="sum")),
    "rbf": Masked(cckd(kernel="rbf")),
    "rbf, raw": Masked(cckd(kernel="rbf", normalize=False, gamma=0.1)),
    "rbf, sum": Masked(cckd(kernel="rbf", reduction="sum")),
    "bilinear, Gram form": Masked(cckd(kernel="bilinear", form="gram")),
    "bilinear, feature form": Masked(cckd(kernel="bilinear", form="feature", normalize=False)),
    "mmd": Masked(cckd(kernel="mmd", normalize=False)),
    "SP, Gram form": Masked(functools.partial(kdkernels.similarity_preserving_loss, form="gram"), *MAPS),
    "SP, feature form": Masked(functools.partial(kdkernels.similarity_preserving_loss, form="feature"), *MAPS),
    "SP, sum": Masked(functools.partial(kdkernels.similarity_preserving_loss, reduction="sum"), *MAPS),
    "RKD": Masked(kdkernels.relational_kd_loss),
    "PKT": Masked(kdkernels.probabilistic_transfer_loss),
    "AT": Masked(kdkernels.attention_transfer_loss, *MAPS),
    "AT, stages": Masked(functools.partial(stages, reduction="sum"), *MAPS),
    "CWD": Masked(kdkernels.channel_wise_loss, (3, 4, 4), (3, 4, 4)),
    "hint": Masked(kdkernels.hint_loss, *OF_ONE_WIDTH),
    "logit MSE": Masked(kdkernels.logit_mse_loss, (9,), (9,)),
    "cross-layer MSE": Masked(cross_layer, *OF_ONE_WIDTH),
    "cross-layer MSE, sum": Masked(functools.partial(cross_layer, reduction="sum"), *OF_ONE_WIDTH),
    "similarity matrices": Masked(of_matrices, *MAPS),
    "CKA, feature form": Masked(functools.partial(kdkernels.linear_cka, form="feature"), (3,), (4,)),
    "CKA, Gram form": Masked(functools.partial(kdkernels.linear_cka, form="gram")),
}


@pytest.fixture
def backend(backend: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Compute in each backend that can run here."""
    if backend == "triton" and request.node.callspec.params.get("name") == "RKD":
        pytest.skip("RKD has no Triton kernels")
    with kdkernels.use_backend(backend):
        yield backend


every_function = pytest.mark.parametrize("name", FUNCTIONS)


def draw(name: str, batch: int = 9, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Return inputs and a mask that counts at least four and at most all but one of the samples."""
    _, *shapes = FUNCTIONS[name]
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[torch.randperm(batch)[: torch.randint(4, batch, ()).item()]] = True
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes], mask


def results(name: str, inputs: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return the value, and the gradients of both networks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = FUNCTIONS[name].function(*leaves, mask=mask)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def agree(name: str, inputs: list[Tensor], mask: Tensor) -> None:
    """Assert that the masked results are those of the shorter batch in float64, and that the padding has gradient 0."""
    value, gradients = results(name, inputs, mask)
    with kdkernels.use_backend("reference"):
        exact, correct = results(name, [x[mask].double() for x in inputs])
        eager, eager_gradients = results(name, [x[mask] for x in inputs])
    tolerance = max(1e-5, 2 * relative_error(eager, exact))
    assert relative_error(value, exact) <= tolerance
    for x, gradient, shorter, of_eager in zip(inputs, gradients, correct, eager_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert not gradient[~mask].any()
        tolerance = max(1e-12 if x.dtype == torch.float64 else 1e-5, 2 * relative_error(of_eager, shorter))
        assert relative_error(gradient[mask], shorter) <= tolerance


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_changes_nothing(backend, name, dtype):
    agree(name, *draw(name, dtype=dtype))


@every_function
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e30])
def test_padding_may_hold_anything(backend, name, padding):
    inputs, mask = draw(name)
    for x in inputs:
        x[~mask] = padding
    agree(name, inputs, mask)


@every_function
def test_a_sample_that_counts_may_not(backend, name):
    inputs, mask = draw(name)
    inputs[1][mask.nonzero()[0, 0]] = torch.nan
    assert results(name, inputs, mask)[0].isnan()


@every_function
def test_no_sample_counts(backend, name):
    inputs, mask = draw(name)
    for x in inputs:
        x[2] = torch.nan
    value, gradients = results(name, inputs, torch.zeros_like(mask))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


@every_function
def test_every_sample_counts(backend, name):
    inputs, mask = draw(name)
    value, gradients = results(name, inputs, torch.ones_like(mask))
    expected, expected_gradients = results(name, inputs)
    for result, correct in zip([value, *gradients], [expected, *expected_gradients], strict=True):
        assert_close(result, correct)


@every_function
def test_strides_and_channels_last(backend, name):
    inputs, _ = draw(name)
    mask = torch.tensor(2 * [True, False, True, True, False, False, True, True, True])[::2]
    agree(name, [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs], mask)
    if inputs[0].dim() == 4:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        agree(name, inputs, mask)
        assert results(name, inputs, mask)[1][0].is_contiguous(memory_format=torch.channels_last)


@every_function
def test_one_network_learns(backend, name):
    inputs, mask = draw(name)
    _, gradients = results(name, inputs, mask)
    for i, gradient in enumerate(gradients):
        leaves = [x.detach().requires_grad_(i == place) for place, x in enumerate(inputs)]
        FUNCTIONS[name].function(*leaves, mask=mask).backward()
        assert_close(leaves[i].grad, gradient)
        assert leaves[1 - i].grad is None


@every_function
def test_compiled_once_for_all_masks(backend, name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name].function, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            inputs, mask = draw(name)
            leaves = [x.requires_grad_() for x in inputs]
            value = compiled(*leaves, mask=mask)
            value.backward()
            expected, gradients = results(name, inputs, mask)
            for result, correct in zip([value, *(x.grad for x in leaves)], [expected, *gradients], strict=True):
                assert_close(result, correct)


@pytest.mark.parametrize("name", ["taylor_rbf", "rbf", "RKD", "similarity matrices", "cross-layer MSE"])
def test_gradcheck(backend, name):
    inputs, mask = draw(name, batch=6, dtype=torch.float64)
    function = functools.partial(FUNCTIONS[name].function, mask=mask)
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", ["taylor_rbf", "rbf", "SP, Gram form", "RKD"])
def test_vmap(name):
    inputs = [torch.randn(3, 7, *shape) for shape in FUNCTIONS[name][1:]]
    masks = torch.rand(3, 7) < 0.6
    masks[:, :2] = True
    function = FUNCTIONS[name].function
    mapped = torch.vmap(lambda s, t, mask: function(s, t, mask=mask))(*inputs, masks)
    each = torch.stack([function(*one[:2], mask=one[2]) for one in zip(*inputs, masks, strict=True)])
    assert_close(mapped, each)


@every_function
def test_a_teacher_of_inference_mode(backend, name):
    with torch.inference_mode():
        (_, teacher), _ = draw(name)
    (student, _), mask = draw(name)
    student.requires_grad_()
    FUNCTIONS[name].function(student, teacher, mask=mask).backward()
    assert student.grad.isfinite().all()


@every_function
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 9, TypeError, "mask must be a tensor of bools, got list"),
        (torch.ones(9), TypeError, "mask must be bool, True for a sample that counts, got torch.float32"),
        (torch.ones(9, 1, dtype=torch.bool), ValueError, r"mask must have shape \(9,\), one bool for each sample of"),
        (torch.ones(8, dtype=torch.bool), ValueError, r"mask must have shape \(9,\), .* got \(8,\)"),
        (torch.ones(9, dtype=torch.bool, device="meta"), ValueError, "mask must be on .*'s device cpu, got meta"),
    ],
)
def test_errors(name, mask, error, message):
    inputs, _ = draw(name)
    with pytest.raises(error, match=message):
        FUNCTIONS[name].function(*inputs, mask=mask)


MODULES = {
    "taylor_rbf": nn.CorrelationCongruenceLoss,
    "SP, Gram form": nn.SimilarityPreservingLoss,
    "RKD": nn.RelationalKDLoss,
    "PKT": nn.ProbabilisticTransferLoss,
    "AT": nn.AttentionTransferLoss,
    "CWD": nn.ChannelWiseLoss,
    "logit MSE": nn.LogitMSELoss,
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    inputs, mask = draw(name)
    assert_close(MODULES[name]()(*inputs, mask), FUNCTIONS[name].function(*inputs, mask=mask))


def test_hint_module():
    """The padding must not reach the gradient of the convolution."""
    hint, (student, _), mask = nn.HintLoss(3, 5), *draw("hint")
    teacher = torch.randn(9, 5, 4, 4)
    correct = torch.autograd.grad(hint(student[mask], teacher[mask]), list(hint.parameters()))
    student[~mask] = teacher[~mask] = torch.nan
    for gradient, expected in zip(
        torch.autograd.grad(hint(student, teacher, mask), list(hint.parameters())), correct, strict=True
    ):
        assert_close(gradient, expected)


def test_semckd_module():
    projected, targets, weights, mask = [[torch.randn(4, 3, 2, 2)]], [[torch.randn(4, 3, 2, 2)]], torch.rand(4, 1, 1), 0
    mask = torch.tensor([True, False, True, True])
    shorter = [[projected[0][0][mask]]], [[targets[0][0][mask]]], weights[mask]
    assert_close(nn.SemCKDLoss()(projected, targets, weights, mask), nn.SemCKDLoss()(*shorter))


def test_similarities_of_padding_are_zero(backend):
    features, mask = torch.randn(5, 4), torch.tensor([True, True, False, True, False])
    features[~mask] = torch.nan
    (matrix,) = kdkernels.similarity_matrices([features], mask=mask)
    assert_close(matrix[mask][:, mask], features[mask] @ features[mask].T)
    assert not matrix[~mask].any()
    assert not matrix[:, ~mask].any()


def test_the_weights_of_padding_have_no_gradient(backend):
    maps = [torch.randn(4, 3, 2, 2) for _ in range(2)]
    maps[0][2] = torch.nan
    weights = torch.rand(4, 1, 1).requires_grad_()
    mask = torch.tensor([True, True, False, True])
    kdkernels.cross_layer_mse([[maps[0]]], [[maps[1]]], weights, mask=mask).backward()
    errors = (maps[0] - maps[1]).square().mean((1, 2, 3))[mask] / 3
    assert_close(weights.grad[mask].flatten(), errors)
    assert not weights.grad[~mask].any()
