"""Triton kernel of ``dkd``: one program per row reads both rows, compares them, and writes the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..tuning import KD_MAX_BLOCK as MAX_BLOCK
from . import fake

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@in_triton(fake.dkd)
def _launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: int,
    ignore_index: int,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    loss, *gradients = fake.dkd.fake(
        student, teacher, labels, alpha, beta, temperature, reduction, ignore_index, grad_student, grad_teacher
    )
    rows, classes = student.shape
    losses = student.new_empty(rows, dtype=torch.float64)
    divisor = losses.new_ones(())
    if reduction == 0:
        divisor = (labels != ignore_index).sum().clamp(min=1).double()
    block = min(triton.next_power_of_2(classes), MAX_BLOCK)
    with torch.cuda.device_of(student):
        _dkd_kernel[(rows,)](
            student,
            teacher,
            labels,
            divisor,
            losses,
            *gradients,
            classes,
            *student.stride(),
            *teacher.stride(),
            labels.stride(0),
            ignore_index,
            alpha,
            beta,
            temperature,
            DTYPE=tl.float64 if loss.dtype == torch.float64 else tl.float32,
            GRAD_STUDENT=grad_student,
            GRAD_TEACHER=grad_teacher,
            BLOCK=block,
            num_warps=max(1, min(block // 256, 8)),
        )
    total = losses if reduction == 2 else losses.sum()
    return (total * (temperature**2 / divisor)).to(loss.dtype), *gradients


@triton.jit
def _log1p(x):
    """Return log(1 + x): with u the rounded 1 + x, it is log(u) x / (u - 1)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1, u - 1)))


@triton.jit
def _expm1(x):
    small = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = 1.0 + small * 0
    for i in tl.static_range(18, 1, -1):
        series = 1 + small * series * (1.0 / i)
    return tl.where(tl.abs(x) < 0.5, small * series, tl.exp(x) - 1)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e / (1 + e), 1 / (1 + e))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log_ratio(a, b, sigmoid_b, difference):
    """Return softplus(a) - softplus(b) = log(1 + sigmoid(b) (exp(a - b) - 1))."""
    near = _log1p(sigmoid_b * _expm1(tl.minimum(tl.maximum(difference, -1.0), 1.0)))
    return tl.where(tl.abs(difference) <= 1, near, _softplus(a) - _softplus(b))


@triton.jit
def _term(p, q, d):
    """Return p log(p / q) - p + q with d = log(p / q). It is p (exp(-d) - 1 + d) >= 0."""
    near = tl.abs(d) < 0.5
    return tl.where(p == 0, q, tl.where(near, p * _remainder(tl.where(near, d, 0)), p * d - (p - q)))


@triton.jit
def _remainder(d):
    """Return exp(-d) - 1 + d for |d| <= 1/2, from its Taylor series."""
    series = 1.0 + d * 0
    for i in tl.static_range(15, 2, -1):
        series = 1 - d * series * (1.0 / i)
    return d * d * 0.5 * series


@triton.jit
def _two_classes(student, teacher):
    """Return KL of (p, 1 - p) from (q, 1 - q), and its slopes, from the margins log(q / (1 - q)) and log(p / (1 - p)).

    The slopes are q - p and p (1 - p) (teacher - student). No probability is rounded before its complement is taken.
    """
    difference = teacher - student
    p, q, p_rest, q_rest = _sigmoid(teacher), _sigmoid(student), _sigmoid(-teacher), _sigmoid(-student)
    divergence = _term(p, q, _log_ratio(-student, -teacher, p_rest, difference))
    divergence += _term(p_rest, q_rest, _log_ratio(student, teacher, p, -difference))
    of_student = tl.where(difference > 0, p * q_rest * _expm1(-difference), -q * p_rest * _expm1(difference))
    weight = p * p_rest
    return divergence, of_student, tl.where(weight == 0, 0, weight * difference)


@triton.jit
def _others(pointer, stride, columns, label, classes, counts, dtype: tl.constexpr, beyond: tl.constexpr):
    """Return the logits of a block, and ``beyond`` in place of the label's logit and after the end of the row."""
    inside = (columns < classes) & (columns != label) & counts
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=inside, other=beyond).to(dtype)


@triton.jit
def _label_logit(pointer, stride, label, known):
    """Return the label's logit, or NaN in place of inf, which no softmax takes."""
    z = tl.load(pointer + label * stride, mask=known, other=0).to(tl.float64)
    return tl.where(z == float("inf"), float("nan"), z)


@triton.jit
def _dkd_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    divisor_ptr,
    losses_ptr,
    grad_student_ptr,
    grad_teacher_ptr,
    classes,
    student_row_stride,
    student_stride,
    teacher_row_stride,
    teacher_stride,
    label_stride,
    ignore_index: tl.int64,
    alpha: tl.float64,
    beta: tl.float64,
    temperature: tl.float64,
    DTYPE: tl.constexpr,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    grad_student_ptr += row * classes
    grad_teacher_ptr += row * classes
    label = tl.load(labels_ptr + row * label_stride)
    counts = label != ignore_index
    known = counts & (label >= 0) & (label < classes)
    inverse_temperature = tl.full((), 1 / tl.full((), temperature, tl.float64), tl.float64)
    inverse = inverse_temperature.to(DTYPE)
    scale = inverse * LOG2_E

    # A comparison with NaN is false, so NaN reaches the result through the sums.
    largest_s = tl.full((), -float("inf"), DTYPE)
    largest_t = tl.full((), -float("inf"), DTYPE)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        largest_s = tl.maximum(largest_s, tl.max(s, 0))
        largest_t = tl.maximum(largest_t, tl.max(t, 0))
    largest_s = tl.where(largest_s == -float("inf"), 0, largest_s)
    largest_t = tl.where(largest_t == -float("inf"), 0, largest_t)
    total_s = tl.full((), 0, DTYPE)
    total_t = tl.full((), 0, DTYPE)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        total_s += tl.sum(tl.exp2((s - largest_s) * scale), 0)
        total_t += tl.sum(tl.exp2((t - largest_t) * scale), 0)
    no_student = total_s == 0  # the maximum would not tell -inf from NaN
    no_teacher = total_t == 0
    inverse_q = tl.where(total_s == 0, 0, 1 / tl.where(total_s == 0, 1, total_s))
    inverse_p = tl.where(total_t == 0, 0, 1 / tl.where(total_t == 0, 1, total_t))
    log_sum_s = tl.log(tl.where(no_student, 1, total_s).to(tl.float64))
    log_sum_t = tl.log(tl.where(no_teacher, 1, total_t).to(tl.float64))

    # The label against all other classes.
    label_s = _label_logit(student_ptr, student_stride, label, known)
    label_t = _label_logit(teacher_ptr, teacher_stride, label, known)
    undecided = (no_student & no_teacher) | (counts == 0)
    undecided |= (label_s == -float("inf")) & (label_t == -float("inf"))
    margin_s = (label_s - largest_s.to(tl.float64)) * inverse_temperature - log_sum_s
    margin_t = (label_t - largest_t.to(tl.float64)) * inverse_temperature - log_sum_t
    margin_s = tl.where(undecided, 0, tl.where(no_student, float("inf"), margin_s))
    margin_t = tl.where(undecided, 0, tl.where(no_teacher, float("inf"), margin_t))
    pair, slope_s, slope_t = _two_classes(margin_s, margin_t)
    wrong = counts & (known == 0)  # a label that is no class
    factor = tl.full((), temperature, tl.float64) / tl.load(divisor_ptr)
    factor = tl.where(wrong, float("nan"), tl.where(counts, factor, 0))
    of_pair_s = (factor * alpha * slope_s).to(DTYPE)
    of_pair_t = (factor * alpha * slope_t).to(DTYPE)
    of_others = (factor * tl.where(no_teacher, 0, beta)).to(DTYPE)

    # The other classes among themselves.
    log_sums = (log_sum_s - log_sum_t).to(DTYPE)
    divergence = tl.full((), 0, tl.float64)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
        q = tl.exp2((s - largest_s) * scale) * inverse_q
        p = tl.exp2((t - largest_t) * scale) * inverse_p
        gone = t == -float("inf")  # p is 0, and any d will do
        d = tl.where(gone, -1, (t - largest_t - (s - largest_s)) * inverse + log_sums)
        small = tl.abs(d) < 0.5
        product = tl.where(d == float("inf"), d, p * d)  # p may have been rounded to 0
        term = tl.where(small, p * _remainder(tl.where(small, d, 0)), product - (p - q))
        divergence += tl.sum(term, 0).to(tl.float64)
        if GRAD_STUDENT:
            gradient = of_others * tl.where(small, term - p * d, q - p) - of_pair_s * q
            gradient = tl.where(columns == label, of_pair_s, gradient)
            tl.store(grad_student_ptr + columns, tl.where(counts, gradient, 0), mask=columns < classes)
    # A student without other classes excludes what the teacher expects. A teacher without them expects nothing.
    divergence = tl.where(no_student, float("inf"), divergence)
    loss = alpha * pair + tl.where(no_teacher, 0, beta * divergence)
    tl.store(losses_ptr + row, tl.where(wrong, float("nan"), tl.where(counts, loss, 0)))

    # Logarithms are relative to the teacher's largest class, as in kd.
    if GRAD_TEACHER:
        there = tl.full((), -float("inf"), DTYPE)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            there = tl.maximum(there, tl.max(tl.where(t == largest_t, s, -float("inf")), 0))
        mean = tl.full((), 0, DTYPE)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            e = tl.exp2((t - largest_t) * scale)
            mean += tl.sum(tl.where(e == 0, 0, e * inverse_p * ((t - largest_t - (s - there)) * inverse)), 0)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _others(student_ptr, student_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            t = _others(teacher_ptr, teacher_stride, columns, label, classes, counts, DTYPE, -float("inf"))
            e = tl.exp2((t - largest_t) * scale)
            ratio = (t - largest_t - (s - there)) * inverse
            gradient = tl.where(e == 0, 0, e * inverse_p * (of_others * (ratio - mean) - of_pair_t))
            gradient = tl.where(columns == label, of_pair_t, gradient)
            tl.store(grad_teacher_ptr + columns, tl.where(counts, gradient, 0), mask=columns < classes)
