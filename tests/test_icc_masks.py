"""icc with samples that do not count and classes that are not there, against the shortened logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close, exactly, loss_and_gradients, results_of
from torch import Tensor

import kdkernels

BATCH, CLASSES = 9, 14


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(BATCH, CLASSES).to(dtype).requires_grad_() for _ in range(2))
    return student, teacher


def masks() -> tuple[Tensor, Tensor]:
    mask, class_mask = torch.rand(BATCH) < 0.6, torch.rand(CLASSES) < 0.6
    mask[2] = class_mask[5] = class_mask[6] = True
    return mask, class_mask


def hidden(x: Tensor, mask: Tensor, class_mask: Tensor) -> Tensor:
    """Return the logits with numbers that must not matter where nothing counts."""
    x = x.detach().clone()
    x[~mask] = torch.nan
    x[:, ~class_mask] = torch.inf
    return x.requires_grad_()


WHICH = ["mask", "class_mask", "both"]


def chosen(which: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mask, class_mask = masks()
    if which == "mask":
        class_mask = torch.ones_like(class_mask)
        return mask, class_mask, {"mask": mask}
    if which == "class_mask":
        mask = torch.ones_like(mask)
        return mask, class_mask, {"class_mask": class_mask}
    return mask, class_mask, {"mask": mask, "class_mask": class_mask}


def check(
    masked: Callable[..., Tensor], short: Callable[..., Tensor], mask: Tensor, class_mask: Tensor, *inputs: Tensor
) -> None:
    """Assert that value and gradients of the masked loss equal those of the shortened loss in float64."""
    value, *gradients = results_of(masked, *(hidden(x, mask, class_mask) for x in inputs))
    cut = [x.detach()[mask][:, class_mask].requires_grad_() for x in inputs]
    expected, *exact = results_of(short, *exactly(*cut))
    assert_close(value, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient[mask][:, class_mask], correct)
        assert not gradient[~mask].any()
        assert not gradient[:, ~class_mask].any()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_equals_shortened(backend, which, per_sample, reduction):
    mask, class_mask, given = chosen(which)
    settings = {"per_sample": per_sample, "reduction": reduction}
    check(
        lambda s, t: kdkernels.inter_class_correlation_loss(s, t, backend=backend, **given, **settings),
        lambda s, t: kdkernels.inter_class_correlation_loss(s, t, backend="reference", **settings),
        mask,
        class_mask,
        *drawn(),
    )


@pytest.mark.parametrize("which", WHICH)
def test_masked_maps(backend, which):
    """A map has zeros for classes that are not there."""
    mask, class_mask, given = chosen(which)
    weights = torch.rand(CLASSES, CLASSES)  # with both signs, the sum could cancel
    logits = hidden(drawn()[0], mask, class_mask)
    found = kdkernels.inter_class_correlation(logits, backend=backend, **given)
    assert found.shape == (CLASSES, CLASSES)
    assert_close(found.sum(1), class_mask.float())
    check(
        lambda z: (weights * kdkernels.inter_class_correlation(z, backend=backend, **given)).sum(),
        lambda z: (
            weights[class_mask][:, class_mask] * kdkernels.inter_class_correlation(z, backend="reference")
        ).sum(),
        mask,
        class_mask,
        logits.detach().nan_to_num(1.0, 1.0),
    )


@pytest.mark.parametrize("empty", ["mask", "class_mask"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_nothing_counts(backend, empty, per_sample):
    student, teacher = drawn()
    student.data[0, 0] = torch.nan
    given = {empty: torch.zeros(BATCH if empty == "mask" else CLASSES, dtype=torch.bool)}
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.inter_class_correlation_loss(s, t, per_sample=per_sample, backend=backend, **given),
        student,
        teacher,
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)
    assert not kdkernels.inter_class_correlation(student, backend=backend, **given).any()


def test_gradcheck(backend):
    mask, class_mask = masks()
    given = {"mask": mask, "class_mask": class_mask, "backend": backend}
    inputs = drawn(torch.float64)
    assert torch.autograd.gradcheck(lambda s, t: kdkernels.inter_class_correlation_loss(s, t, **given), inputs)
    assert torch.autograd.gradcheck(lambda z: kdkernels.inter_class_correlation(z, **given), inputs[:1])


def test_large_batches_in_chunks(monkeypatch):
    """The reference computes some rows of the map at a time."""
    from kdkernels.ops.icc import reference

    mask, class_mask = masks()
    inputs, given = drawn(torch.float64), {"mask": mask, "class_mask": class_mask, "backend": "reference"}

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return kdkernels.inter_class_correlation_loss(s, t, **given)

    expected = results_of(loss, *inputs)
    monkeypatch.setattr(reference, "CHUNK", 3 * BATCH * CLASSES)
    for found, exact in zip(results_of(loss, *inputs), expected, strict=True):
        assert_close(found, exact)


def test_compiled_into_one_graph(backend):
    """One graph for all masks."""
    if backend == "triton":
        pytest.skip("the interpreter does not compile")
    torch.compiler.reset()

    def loss(s: Tensor, t: Tensor, mask: Tensor, class_mask: Tensor) -> Tensor:
        given = {"mask": mask, "class_mask": class_mask, "backend": backend}
        maps = kdkernels.inter_class_correlation(s, **given)
        return kdkernels.inter_class_correlation_loss(s, t, **given) + maps.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = drawn()
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            given = masks()
            found, expected = (
                results_of(lambda s, t, f=f, given=given: f(s, t, *given), student, teacher) for f in (compiled, loss)
            )
            for result, exact in zip(found, expected, strict=True):
                assert_close(result, exact)


def test_module_takes_masks(backend):
    student, teacher = drawn()
    mask, class_mask = masks()
    module = kdkernels.nn.InterClassCorrelationLoss(backend=backend)
    function = kdkernels.inter_class_correlation_loss
    assert torch.equal(
        module(student, teacher, mask, class_mask),
        function(student, teacher, mask=mask, class_mask=class_mask, backend=backend),
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mask": [True]}, TypeError, "mask must be a tensor of bools, got list"),
        ({"mask": torch.ones(BATCH)}, TypeError, "mask must be bool.*got torch.float32"),
        ({"mask": torch.ones(CLASSES).bool()}, ValueError, rf"mask must have shape \({BATCH},\).*got \({CLASSES},\)"),
        ({"class_mask": [True]}, TypeError, "class_mask must be a bool tensor, got list"),
        ({"class_mask": torch.ones(CLASSES)}, TypeError, "class_mask must be a bool tensor.*got torch.float32"),
        ({"class_mask": torch.ones(BATCH).bool()}, ValueError, rf"class_mask must have shape \({CLASSES},\)"),
    ],
)
def test_misuse_is_explained(settings, error, message):
    student, teacher = drawn()
    with pytest.raises(error, match=message):
        kdkernels.inter_class_correlation_loss(student, teacher, **settings)
    with pytest.raises(error, match=message):
        kdkernels.inter_class_correlation(student, **settings)
