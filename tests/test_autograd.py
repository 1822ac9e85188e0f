"""What autograd keeps of a loss, and what may be done with a loss: over the table of every loss, on every backend."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import assert_close, needs_native
from losses import Loss, logits, maps
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels import nn


def drawn(loss: Loss, *, teacher_learns: bool = False) -> tuple[Tensor, Tensor]:
    student, teacher = loss.draw()
    return student.requires_grad_(), teacher.requires_grad_(teacher_learns)


def test_after_backward_nothing_but_the_scalar_is_alive(loss):
    """``total += loss`` over an epoch keeps every graph, but not what was saved in it."""
    student, teacher = drawn(loss)
    watched = [weakref.ref(student), weakref.ref(teacher)]
    inner = student * 1.0  # no leaf, as a network's features
    watched.append(weakref.ref(inner))
    total = loss.function(inner, teacher)
    total.backward()
    del student, teacher, inner
    gc.collect()
    alive = [place for place, reference in zip(("teacher", "features"), watched[1:], strict=True) if reference()]
    assert not alive
    assert total.isfinite()


def test_a_loss_may_be_changed_in_place(loss):
    """As by ``loss += other`` and ``loss *= weight``."""
    student, teacher = drawn(loss)
    expected = torch.autograd.grad(loss.function(student, teacher), student)[0]
    changed = loss.function(student, teacher)
    changed *= 3
    changed += 1
    assert_close(torch.autograd.grad(changed, student)[0], 3 * expected)


def test_a_second_backward_is_the_first(loss):
    """The gradient of the loss scales the result, and the caller may change a gradient."""
    inputs = drawn(loss, teacher_learns=True)
    value = loss.function(*inputs)
    first, thrice = (torch.autograd.grad(factor * value, inputs, retain_graph=True) for factor in (1, 3))
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for once, three, again in zip(kept, thrice, torch.autograd.grad(value, inputs), strict=True):
        assert_close(three, 3 * once)
        assert torch.equal(again, once)


def test_a_teacher_under_inference_mode(loss):
    student, teacher = drawn(loss)
    with torch.inference_mode():
        frozen = teacher.clone()
    expected = torch.autograd.grad(loss.function(student, teacher), student)[0]
    assert_close(torch.autograd.grad(loss.function(student, frozen), student)[0], expected)


def test_batched_gradients(loss):
    """``is_grads_batched``, by which ``torch.autograd.functional.jacobian(vectorize=True)`` works."""
    student, teacher = drawn(loss)
    value = loss.function(student, teacher)
    (expected,) = torch.autograd.grad(value, student, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5])
    (found,) = torch.autograd.grad(value, student, factors, is_grads_batched=True)
    assert_close(found, torch.stack([factor * expected for factor in factors]))


TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "kd": lambda x: kdkernels.kd_loss(x.flatten(1), x.flatten(1)),
    "local_correlation": lambda x: kdkernels.local_correlation_loss([x, x], [2 * x, 2 * x], 2),
    "gram": lambda x: kdkernels.similarity_matrices([x, x]).square().mean(),
    "feature_mse": lambda x: kdkernels.cross_layer_mse([[x, x]], [[x + 1, x]], torch.ones(len(x), 1, 2)),
}


@needs_native
@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_may_come_twice_in_a_compiled_call(name):
    function, maps = TWICE[name], torch.randn(3, 4, 4, 4, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = compiled(maps), function(maps)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(loss, maps)[0] for loss in (found, expected)))


SCHEDULES: dict[str, tuple[Callable[[], torch.nn.Module], str, Callable]] = {
    "kd": (nn.KDLoss, "temperature", logits),
    "teacher_free_kd": (nn.TeacherFreeKDLoss, "temperature", logits),
    "dkd": (nn.DKDLoss, "beta", logits),
    "dist": (nn.DISTLoss, "temperature", logits),
    "correlation_congruence": (nn.CorrelationCongruenceLoss, "gamma", logits),
    "correlation_congruence rbf": (lambda: nn.CorrelationCongruenceLoss(kernel="rbf"), "gamma", logits),
    "rkd": (nn.RelationalKDLoss, "angle_weight", logits),
    "local_correlation": (lambda: nn.LocalCorrelationLoss(2), "weights", maps),
}


@needs_native
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_not_recompile(name):
    """There is one graph for the first value of a setting and one for all other values. The values equal
    eager code's.
    """
    make, attribute, shapes = SCHEDULES[name]
    module = make()
    more = (torch.tensor([0, 1, 2, 3, 4, 0]),) if name in ("teacher_free_kd", "dkd") else ()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for value in (4.0, 3.5, 3.0, 2.5, 2.0):
        setattr(module, attribute, [value, 1.0, 0.5] if attribute == "weights" else value)
        student, teacher = map(torch.randn, shapes(6, 5))
        student.requires_grad_()
        found, expected = (f(student, teacher, *more) for f in (compiled, module))
        assert_close(found, expected)
        assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))
    assert counter.frame_count <= 2


CCKD = kdkernels.correlation_congruence_loss
OF_NUMBERS: dict[str, tuple[Callable, Callable]] = {
    "kd": (lambda s, t, x: kdkernels.kd_loss(s, t, temperature=x), logits),
    "teacher_free_kd": (
        lambda s, t, x: kdkernels.teacher_free_kd_loss(s, t, torch.tensor([0, 1, 2, 3, 4, 0]), alpha=x, temperature=x),
        logits,
    ),
    "correlation_congruence": (lambda s, t, x: CCKD(s, t, gamma=x), logits),
    "correlation_congruence rbf": (lambda s, t, x: CCKD(s, t, gamma=x, kernel="rbf"), logits),
    "kernel_matrix": (lambda s, t, x: (kdkernels.kernel_matrix(s, gamma=x) * t.sum()).sum(), logits),
    "rkd": (lambda s, t, x: kdkernels.relational_kd_loss(s, t, distance_weight=x, angle_weight=x), logits),
    "pkt": (lambda s, t, x: kdkernels.probabilistic_transfer_loss(s, t, eps=x * 1e-3), logits),
    "attention_transfer": (lambda s, t, x: kdkernels.attention_transfer_loss(s, t, eps=x), maps),
    "channel_wise": (lambda s, t, x: kdkernels.channel_wise_loss(s, t[:, :5, :, :4], temperature=x), maps),
    "local_correlation": (lambda s, t, x: kdkernels.local_correlation_loss(s, t, 2, weights=(x, 1.0, x)), maps),
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_of_numpy_compile_once(name, backend):
    """A compiled function takes a NumPy number as a tensor, whose value it does not know."""
    loss, shapes = OF_NUMBERS[name]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for value in (0.5, 0.25, 0.75):
        student, teacher = map(torch.randn, shapes(6, 5))
        student.requires_grad_()
        with kdkernels.use_backend(backend):
            found, expected = compiled(student, teacher, np.float32(value)), loss(student, teacher, value)
        assert_close(found, expected)
        assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))
    assert counter.frame_count == 1
