"""Triton kernel of ``kd``: one program per row reads both rows, sums the divergence, and writes the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..shapes import loss_and_gradients
from ..tuning import KD_MAX_BLOCK as MAX_BLOCK
from . import fake

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # so that -inf minus the largest logit is -inf
INFINITY = tl.constexpr(float("inf"))


@in_triton(fake.kd)
def _launch(
    student: Tensor, teacher: Tensor, temperature: float, scale: float, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    loss, *gradients = loss_and_gradients(student, teacher, grad_student, grad_teacher)
    losses = student.new_empty(student.shape[0], dtype=loss.dtype)
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
    """Return logits / T in units of log 2, and ``beyond`` after the end of the row."""
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=columns < classes, other=beyond).to(dtype) * scale


@triton.jit
def _add_to_log_sum(largest, total, z):
    """Add one block to a running log-sum-exp (base 2)."""
    new = tl.maximum(largest, tl.max(z, 0))
    return new, total * tl.exp2(largest - new) + tl.sum(tl.exp2(z - new), 0)


@triton.jit
def _log_ratio(s, t, student_there, largest_t, absent):
    """Return log(p / q), relative to the teacher's largest class."""
    return tl.where((s == -INFINITY) | (t == -INFINITY), absent, t - largest_t - (s - student_there))


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

    # A comparison with NaN is false, so NaN reaches the result through the sums.
    largest_s = tl.full((), LOWEST, dtype)
    largest_t = tl.full((), LOWEST, dtype)
    total_s = tl.full((), 0, dtype)
    total_t = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, -float("inf"))
        t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, -float("inf"))
        largest_s, total_s = _add_to_log_sum(largest_s, total_s, s)
        largest_t, total_t = _add_to_log_sum(largest_t, total_t, t)
    # A sum of 0 is the sum of a row of -inf.
    log_sum_s = tl.where(total_s > 0, largest_s + tl.log2(total_s), float("nan"))
    log_sum_t = tl.where(total_t > 0, largest_t + tl.log2(total_t), float("nan"))

    divergence = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0)
        t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0)
        log_q = s - log_sum_s
        log_p = t - log_sum_t
        p = tl.exp2(log_p)
        # A logit of -inf is an absent class. The difference of two of them would be NaN.
        terms = tl.where(s == -INFINITY, INFINITY, p * (log_p - log_q))
        terms = tl.where(inside & (t != -INFINITY), terms, 0)
        divergence += tl.sum(terms, 0) * LN_2
        if GRAD_STUDENT:
            gradient = (tl.exp2(log_q) - p) * slope
            tl.store(grad_student_ptr + columns, gradient, mask=inside)
    divergence += 0 * (log_sum_s + log_sum_t)
    tl.store(losses_ptr + row, divergence * factor)

    # Logarithms are relative to the teacher's largest class. If its p is nearly 1, the divergence is nearly its
    # logarithm, and the difference would cancel.
    if GRAD_TEACHER:
        student_there = tl.full((), -INFINITY, dtype)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, -float("inf"))
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, -float("inf"))
            student_there = tl.maximum(student_there, tl.max(tl.where(t == largest_t, s, -INFINITY), 0))
        student_there = tl.where(student_there == -INFINITY, largest_s, student_there)
        absent = (student_there - log_sum_s) - (largest_t - log_sum_t)  # the logarithm 0 of an absent class
        mean = tl.full((), 0, dtype)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0)
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0)
            terms = tl.exp2(t - log_sum_t) * _log_ratio(s, t, student_there, largest_t, absent)
            mean += tl.sum(tl.where(columns < classes, terms, 0), 0)
        mean = tl.where(divergence == divergence, mean, float("nan"))
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _exponents(student_ptr, student_stride, columns, classes, scale, dtype, 0)
            t = _exponents(teacher_ptr, teacher_stride, columns, classes, scale, dtype, 0)
            ratio = _log_ratio(s, t, student_there, largest_t, absent)
            gradient = tl.exp2(t - log_sum_t) * (ratio - mean) * (LN_2 * slope)
            tl.store(grad_teacher_ptr + columns, gradient, mask=columns < classes)
