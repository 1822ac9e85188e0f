"""Triton kernel of ``kd``: one program per row reads both rows, sums the divergence and writes the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ..autograd import scaled
from ..tuning import KD_MAX_BLOCK as MAX_BLOCK

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def kd(student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
    """``scale`` times the batch mean of KL(softmax(teacher / T) ‖ softmax(student / T))."""
    return _KD.apply(student, teacher, temperature, scale)[0]


class _KD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, scale: float):
        ctx.set_materialize_grads(False)
        ctx.dtypes = student.dtype, teacher.dtype
        needed = ctx.needs_input_grad[:2]
        loss, *gradients = torch.ops.kdkernels_triton.kd(student, teacher, temperature, scale, *needed)
        ctx.save_for_backward(*gradients)
        return loss, *gradients

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients = (
            scaled(grad, gradient, dtype) if needed else None
            for needed, gradient, dtype in zip(ctx.needs_input_grad, ctx.saved_tensors, ctx.dtypes, strict=False)
        )
        return *gradients, None, None


library.define(
    "kdkernels_triton::kd",
    "(Tensor student, Tensor teacher, float temperature, float scale, bool grad_student, bool grad_teacher)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
)


def _allocate(student: Tensor, teacher: Tensor, grad_student: bool, grad_teacher: bool) -> list[Tensor]:
    """The loss of each row and the gradients that are wanted."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    rows, classes = student.shape
    gradients = [
        student.new_empty((rows, classes) if wanted else 0, dtype=dtype) for wanted in (grad_student, grad_teacher)
    ]
    return [student.new_empty(rows, dtype=dtype), *gradients]


@library.register_fake("kdkernels_triton::kd")
def _fake(student, teacher, temperature, scale, grad_student, grad_teacher):
    losses, *gradients = _allocate(student, teacher, grad_student, grad_teacher)
    return losses.new_empty(()), *gradients


@library.impl("kdkernels_triton::kd", "CompositeExplicitAutograd")
def _launch(student, teacher, temperature, scale, grad_student, grad_teacher):
    losses, *gradients = _allocate(student, teacher, grad_student, grad_teacher)
    rows, classes = student.shape
    block = min(triton.next_power_of_2(classes), MAX_BLOCK)
    with torch.cuda.device_of(student):
        _kd_kernel[(rows,)](
            student,
            teacher,
            losses,
            *gradients,
            classes,
            *student.stride(),
            *teacher.stride(),
            1 / temperature,
            scale / rows,
            GRAD_STUDENT=grad_student,
            GRAD_TEACHER=grad_teacher,
            BLOCK=block,
            num_warps=max(1, min(block // 256, 8)),
        )
    return losses.sum(), *gradients


@triton.jit
def _exponents(pointer, stride, columns, classes, scale, dtype: tl.constexpr, beyond: tl.constexpr):
    """logits / T in units of log 2; ``beyond`` where the row has ended."""
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=columns < classes, other=beyond).to(dtype) * scale


@triton.jit
def _add_to_log_sum(largest, total, z):
    """One block more in a running log-sum-exp (base 2)."""
    new = tl.maximum(largest, tl.max(z, 0))
    return new, total * tl.exp2(largest - new) + tl.sum(tl.exp2(z - new), 0)


@triton.jit
def _kd_kernel(
    student_ptr,
    teacher_ptr,
    losses_ptr,
    grad_student_ptr,
    grad_teacher_ptr,
    classes,
    student_row_stride,
    student_stride,
    teacher_row_stride,
    teacher_stride,
    inverse_temperature: tl.float64,
    factor: tl.float64,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    grad_student_ptr += row * classes
    grad_teacher_ptr += row * classes
    inverse_temperature = tl.full((), inverse_temperature, dtype)
    factor = tl.full((), factor, dtype)
    scale = inverse_temperature * LOG2_E
    slope = inverse_temperature * factor

    # NaN compares as neither larger nor smaller: it reaches the result through the sums.
    largest_s = tl.full((), -float("inf"), dtype)
    largest_t = tl.full((), -float("inf"), dtype)
    total_s = tl.full((), 0, dtype)
    total_t = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, -float("inf"))
        t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, -float("inf"))
        largest_s, total_s = _add_to_log_sum(largest_s, total_s, s)
        largest_t, total_t = _add_to_log_sum(largest_t, total_t, t)
    log_sum_s = largest_s + tl.log2(total_s)
    log_sum_t = largest_t + tl.log2(total_t)

    divergence = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        log_q = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0) - log_sum_s
        log_p = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0) - log_sum_t
        p = tl.exp2(log_p)
        divergence += tl.sum(tl.where(inside, p * (log_p - log_q), 0), 0) * LN_2
        if GRAD_STUDENT:
            gradient = (tl.exp2(log_q) - p) * slope
            tl.store(grad_student_ptr + columns, gradient, mask=inside)
    tl.store(losses_ptr + row, divergence * factor)

    # Logarithms are counted from that of the teacher's largest class: where its p is nearly 1 the divergence is nearly
    # its logarithm, and the difference would be lost.
    if GRAD_TEACHER:
        student_there = tl.full((), -float("inf"), dtype)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, -float("inf"))
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, -float("inf"))
            student_there = tl.maximum(student_there, tl.max(tl.where(t == largest_t, s, -float("inf")), 0))
        mean = tl.full((), 0, dtype)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0)
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0)
            terms = tl.exp2(t - log_sum_t) * (t - largest_t - (s - student_there))
            mean += tl.sum(tl.where(columns < classes, terms, 0), 0)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0)
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0)
            gradient = tl.exp2(t - log_sum_t) * (t - largest_t - (s - student_there) - mean) * (LN_2 * slope)
            tl.store(grad_teacher_ptr + columns, gradient, mask=columns < classes)
