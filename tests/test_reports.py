"""Faults that users of other projects reported, tried on this package. docs/reports.md has the list."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import kdkernels
from kdkernels.nn import FeatureCapture

LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "kd": (kdkernels.kd_loss, (8, 10)),
    "logit mse": (kdkernels.logit_mse_loss, (8, 10)),
    "icct": (kdkernels.inter_class_correlation_loss, (8, 10)),
    "icct per sample": (functools.partial(kdkernels.inter_class_correlation_loss, per_sample=True), (8, 10)),
    "cckd": (kdkernels.correlation_congruence_loss, (8, 10)),
    "sp": (kdkernels.similarity_preserving_loss, (8, 10)),
    "rkd": (kdkernels.relational_kd_loss, (8, 10)),
    "pkt": (kdkernels.probabilistic_transfer_loss, (8, 10)),
    "at": (kdkernels.attention_transfer_loss, (8, 3, 4, 4)),
    "hint": (kdkernels.hint_loss, (8, 3, 4, 4)),
    "lkd": (functools.partial(kdkernels.local_correlation_loss, k=2), (8, 3, 4, 4)),
}
every_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("rows", ["equal", "zero"])
def test_equal_and_zero_rows_in_half_precision(loss, shape, rows):
    """lightonai/pylate 239: the eps of a norm is 0 in float16, and rows that are alike are divided by it."""
    row = torch.zeros(shape[1:]) if rows == "zero" else torch.randn(shape[1:])
    for dtype in (torch.float16, torch.bfloat16):
        student = row.expand(shape).to(dtype).clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            value = loss(student, torch.randn(shape).to(dtype))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@every_loss
def test_a_student_that_is_the_teacher(loss, shape):
    """PaddlePaddle/Paddle 32448: the gradient of a distance of 0 is NaN."""
    teacher = torch.randn(shape)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.abs() < 1e-5
    assert student.grad.abs().max() < 1e-3


@every_loss
def test_a_batch_of_one(loss, shape):
    """lightly-ai/lightly 307: a squeeze takes the batch away."""
    student = torch.randn(1, *shape[1:], requires_grad=True)
    value = loss(student, torch.randn(1, *shape[1:]))
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@every_loss
def test_numbers_that_are_none_do_not_become_some(loss, shape):
    """NovaSearch-Team/RAG-Retrieval 91, microsoft/LMOps 38: a target that is NaN or infinite shows in the loss."""
    for bad in (torch.nan, torch.inf):
        teacher = torch.randn(shape)
        teacher.view(-1)[3] = bad
        assert not loss(torch.randn(shape), teacher).isfinite()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_capture_that_nobody_holds_leaves_the_model():
    """KamitaniLab/bdpy 72: hooks stay when the extractor is gone, and keep the features of every pass."""
    model = network()

    def features() -> Tensor:
        capture = FeatureCapture(model, "1")
        model(torch.randn(2, 4))
        return capture.features[0]

    assert features().shape == (2, 5)
    gc.collect()
    assert not hooks(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_have_captures_of_their_own_or_none(duplicate):
    """Averages of models and spawned processes copy a model: they must not write to the capture, nor hold features."""
    model = network()
    capture = FeatureCapture(model, "1")
    twin = duplicate(model)
    twin(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="no map of '1'"):
        _ = capture.features
    model(torch.randn(2, 4))
    both = duplicate([model, capture])
    x = torch.randn(3, 4)
    both[0](x)
    assert torch.equal(both[1].features[0], both[0][:2](x))
    assert capture.features[0].shape == (2, 5)
    both[1].remove()
    assert not hooks(both[0])
    alone = duplicate(capture)
    alone._model(x)
    assert alone.features[0].shape == (3, 5)
    del alone
    gc.collect()
    assert hooks(model)


def test_captures_of_one_model_do_not_meddle():
    """deel-ai/oodeel 122: one extractor takes off the hooks of another."""
    model, x = network(), torch.randn(2, 4)
    one, other = FeatureCapture(model, ["0", "1"]), FeatureCapture(model, ["1", "2"])
    one.remove()
    model(x)
    assert torch.equal(other.features[1], model(x))


def test_layers_that_are_not_called_are_named():
    """pytorch/vision 5193, numenta/nupic.torch 51: hooks do not run in traced graphs, nor where forward is called."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.forward(x)

    for model in (Direct(), fx.symbolic_trace(Direct())):
        with FeatureCapture(model, "layer") as capture:
            model(torch.randn(2, 4))
            if isinstance(model, fx.GraphModule) and "layer" in str(model.graph):
                continue  # traced as a call of the module
            with pytest.raises(RuntimeError, match="no map of 'layer': it has not run"):
                _ = capture.features
