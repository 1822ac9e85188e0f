"""Triton kernels of ``icc``: logarithms have base 2, and sums over samples or classes have the order of a loop.

Every exponential is computed where it is needed, from the logits and the logarithm of its row's sum (b x K). The loss
processes chunks of rows of the map. The negative derivatives with respect to a chunk are held until the gradient to the
logits is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..shapes import accumulation_dtype
from ..tuning import ICC_BLOCK as BLOCK
from . import fake

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A derivative of 2⁴⁰ or more is held as -2 minus its logarithm. Other derivatives are above -1.5.
MOST = tl.constexpr(40.0)
HELD = 2**22  # entries of the map in a chunk


class _Logits:
    """One network's logits, the classes of every sample's extreme logits, and the logarithm of every row's sum."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.batch, self.classes = logits.shape
        self.logits = logits
        self.extremes = logits.new_empty((self.batch, 2), dtype=torch.int32)
        self.log_sums = logits.new_empty((self.batch, self.classes), dtype=dtype)
        _sums_kernel[self.batch, triton.cdiv(self.classes, BLOCK)](*self.arguments, self.classes, BLOCK=BLOCK)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.logits, *self.logits.stride(), self.extremes, self.log_sums

    def pull_back(self, negative: Tensor, first: int, scale: float, grad: Tensor, derivative: bool) -> None:
        """Add the contribution of the rows from ``first`` on to ``grad``. ``negative`` is the negative derivative with
        respect to M.
        """
        means = torch.empty_like(self.log_sums)
        rows, blocks = len(negative), triton.cdiv(self.classes, BLOCK)
        call = *self.arguments, negative, means, first, rows, self.classes
        _means_kernel[self.batch, triton.cdiv(rows, BLOCK)](*call, CODED=derivative, BLOCK=BLOCK)
        _pull_back_kernel[self.batch, blocks](
            *call, grad, scale / self.batch, CODED=derivative, BLOCK=BLOCK, num_warps=8
        )


@in_triton(fake.icc_map)
def _launch_map(logits: Tensor) -> Tensor:
    dtype = accumulation_dtype(logits)
    with torch.cuda.device_of(logits):
        z = _Logits(logits, dtype)
        result = logits.new_empty((z.classes, z.classes), dtype=dtype)
        blocks = triton.cdiv(z.classes, BLOCK)
        _map_kernel[blocks, blocks](*z.arguments, result, z.batch, z.classes, BLOCK=BLOCK)
    return result


@in_triton(fake.icc_map_backward)
def _launch_map_backward(grad_map: Tensor, logits: Tensor) -> Tensor:
    dtype = accumulation_dtype(logits)
    grad = logits.new_zeros(logits.shape, dtype=dtype)
    with torch.cuda.device_of(logits):
        _Logits(logits, dtype).pull_back(-grad_map.to(dtype).contiguous(), 0, 1.0, grad, derivative=False)
    return grad


@in_triton(fake.icc_loss)
def _launch_loss(
    student: Tensor, teacher: Tensor, per_sample: bool, scale: float, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student, teacher)
    grads = [
        student.new_zeros(student.shape if wanted else (0,), dtype=dtype) for wanted in (grad_student, grad_teacher)
    ]
    with torch.cuda.device_of(student):
        compare = _compare_samples if per_sample else _compare_maps
        loss = compare(_Logits(student, dtype), _Logits(teacher, dtype), scale, grads, (grad_student, grad_teacher))
    return loss, *grads


def _compare_samples(
    student: _Logits, teacher: _Logits, scale: float, grads: list[Tensor], wanted: tuple[bool, bool]
) -> Tensor:
    grid = student.batch, triton.cdiv(student.classes, BLOCK)
    divergences, tops, means = (torch.empty_like(student.log_sums) for _ in range(3))
    call = *student.arguments, *teacher.arguments, tops, means
    _samples_kernel[grid](*call, divergences, student.classes, BLOCK=BLOCK)
    if any(wanted):
        _samples_backward_kernel[grid](
            *call,
            *grads,
            student.classes,
            scale / student.batch,
            GRAD_STUDENT=wanted[0],
            GRAD_TEACHER=wanted[1],
            BLOCK=BLOCK,
            num_warps=8,  # its tiles do not fit in the registers of 4 warps
        )
    return divergences.sum() * (scale / student.batch)


def _compare_maps(
    student: _Logits, teacher: _Logits, scale: float, grads: list[Tensor], wanted: tuple[bool, bool]
) -> Tensor:
    classes, step = student.classes, max(1, HELD // student.classes)
    blocks = triton.cdiv(classes, BLOCK)
    sums = []
    for first in range(0, classes, step):
        rows = min(step, classes - first)
        row_blocks = triton.cdiv(rows, BLOCK)
        parts = student.log_sums.new_empty(row_blocks * blocks)
        negatives = [parts.new_empty((rows, classes) if want else (0, classes)) for want in wanted]
        _compare_kernel[row_blocks, blocks](
            *student.arguments,
            *teacher.arguments,
            parts,
            *negatives,
            first,
            rows,
            student.batch,
            classes,
            GRAD_STUDENT=wanted[0],
            GRAD_TEACHER=wanted[1],
            BLOCK=BLOCK,
        )
        for z, negative, grad, want, derivative in zip(
            (student, teacher), negatives, grads, wanted, (True, False), strict=True
        ):
            if want:
                z.pull_back(negative, first, scale, grad, derivative)
        sums.append(parts.sum())
    first_sum, *others = sums
    return sum(others, first_sum) * scale


@triton.jit
def _load(pointer, columns, stride, classes, dtype: tl.constexpr):
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=columns < classes, other=0).to(dtype)


@triton.jit
def _sums_kernel(logits_ptr, row_stride, stride, extremes_ptr, log_sums_ptr, classes, BLOCK: tl.constexpr):
    """Per row of one sample: log₂ Σ_j exp(z_i z_j - max_l z_i z_l), and the classes of its extreme logits."""
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    logits_ptr += sample * row_stride
    smallest = tl.full((BLOCK,), float("inf"), dtype)
    largest = tl.full((BLOCK,), -float("inf"), dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(logits_ptr, columns, stride, classes, dtype)
        smallest = tl.where((columns < classes) & (z < smallest), z, smallest)
        largest = tl.where((columns < classes) & (z > largest), z, largest)
    lowest, highest = tl.min(smallest, 0), tl.max(largest, 0)

    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z_i = _load(logits_ptr, i, stride, classes, dtype)
    partner = tl.where(z_i < 0, lowest, highest)
    sums = tl.full((BLOCK,), 0, dtype)
    others = sums  # without the largest, which is 1
    at_lowest = tl.full((BLOCK,), 0, tl.int32) + (classes - 1)
    at_highest = at_lowest
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(logits_ptr, columns, stride, classes, dtype)
        at_lowest = tl.where((z == lowest) & (columns < at_lowest), columns, at_lowest)
        at_highest = tl.where((z == highest) & (columns < at_highest), columns, at_highest)
        powers = tl.exp2((z[None, :] - partner[:, None]) * (z_i * LOG2_E)[:, None])
        powers = tl.where((columns < classes)[None, :], powers, 0)
        sums += tl.sum(powers, 1)
        others += tl.sum(tl.where(powers < 1, powers, 0), 1)
    # If the largest is nearly the whole sum, only the others distinguish such rows. With u the rounded 1 + x, log(1 +
    # x) is log(u) x / (u - 1).
    rounded = 1 + others
    near = tl.where(rounded == 1, others * LOG2_E, tl.log2(rounded) * (others / tl.where(rounded == 1, 1, rounded - 1)))
    log_sums = tl.where(sums < 1.5, near, tl.log2(sums))
    tl.store(log_sums_ptr + sample * classes + i, log_sums, mask=i < classes)
    if tl.program_id(1) == 0:
        tl.store(extremes_ptr + 2 * sample, tl.min(at_lowest, 0))
        tl.store(extremes_ptr + 2 * sample + 1, tl.min(at_highest, 0))


@triton.jit
def _rows(logits_ptr, stride, extremes_ptr, log_sums_ptr, sample, i, classes):
    """Return for some rows of one sample's A: the logit, class and logit of the largest entry, and log₂ of the sum.

    ``logits_ptr`` points to the sample's first logit.
    """
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    z = _load(logits_ptr, i, stride, classes, dtype)
    top = tl.where(z < 0, tl.load(extremes_ptr + 2 * sample), tl.load(extremes_ptr + 2 * sample + 1))
    partner = tl.load(logits_ptr + top.to(tl.int64) * stride).to(dtype)
    return z, top, partner, tl.load(log_sums_ptr + sample * classes + i, mask=i < classes, other=0)


@triton.jit
def _log_map(logits_ptr, row_stride, stride, extremes_ptr, log_sums_ptr, i, j, batch, classes):
    """Return a tile of log₂ M: log-sum-exp over the samples, with one exponential per sample."""
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    largest = tl.full((i.shape[0], j.shape[0]), -float("inf"), dtype)
    sums = tl.full((i.shape[0], j.shape[0]), 0, dtype)
    sample = tl.full((), 0, tl.int64)
    for _ in range(batch):
        z_i, _, partner, log_sum = _rows(logits_ptr, stride, extremes_ptr, log_sums_ptr, sample, i, classes)
        z_j = _load(logits_ptr, j, stride, classes, dtype)
        log_p = (z_j[None, :] - partner[:, None]) * (z_i * LOG2_E)[:, None] - log_sum[:, None]
        smaller = tl.exp2(-tl.abs(log_p - largest))
        sums = tl.where(log_p > largest, sums * smaller + 1, sums + smaller)
        largest = tl.maximum(largest, log_p)
        logits_ptr += row_stride
        sample += 1
    return largest + tl.log2(sums / batch)


@triton.jit
def _map_kernel(
    logits_ptr, row_stride, stride, extremes_ptr, log_sums_ptr, out_ptr, batch, classes, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log_m = _log_map(logits_ptr, row_stride, stride, extremes_ptr, log_sums_ptr, i, j, batch, classes)
    inside = (i < classes)[:, None] & (j < classes)[None, :]
    tl.store(out_ptr + i.to(tl.int64)[:, None] * classes + j[None, :], tl.exp2(log_m), mask=inside)


@triton.jit
def _remainder(d):
    """Return exp(-d) - 1 + d for |d| <= 1/4, from its Taylor series."""
    series = tl.full(d.shape, 1, d.dtype)
    for i in tl.static_range(14, 2, -1):
        series = 1 - d * series * (1.0 / i)
    return d * d * 0.5 * series


@triton.jit
def _compare_kernel(
    student_ptr,
    student_row_stride,
    student_stride,
    student_extremes_ptr,
    student_log_sums_ptr,
    teacher_ptr,
    teacher_row_stride,
    teacher_stride,
    teacher_extremes_ptr,
    teacher_log_sums_ptr,
    parts_ptr,
    negative_student_ptr,
    negative_teacher_ptr,
    first,
    rows,
    batch,
    classes,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a tile's share of KL(t ‖ s) = Σ t log(t / s) - t + s, and the negative derivatives by s and t."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = first + row
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log_s = _log_map(
        student_ptr,
        student_row_stride,
        student_stride,
        student_extremes_ptr,
        student_log_sums_ptr,
        i,
        j,
        batch,
        classes,
    )
    log_t = _log_map(
        teacher_ptr,
        teacher_row_stride,
        teacher_stride,
        teacher_extremes_ptr,
        teacher_log_sums_ptr,
        i,
        j,
        batch,
        classes,
    )
    log_ratio = log_t - log_s
    d = log_ratio * LN_2
    s, t = tl.exp2(log_s), tl.exp2(log_t)
    near = tl.abs(d) < 0.25
    inside = (row < rows)[:, None] & (j < classes)[None, :]
    terms = tl.where(near, t * _remainder(d), t * d - (t - s))
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part, tl.sum(tl.sum(tl.where(inside, terms, 0), 1), 0))
    at = row.to(tl.int64)[:, None] * classes + j[None, :]
    if GRAD_STUDENT:
        ratio = tl.where(near, _remainder(-d) + d, tl.exp2(tl.minimum(log_ratio, MOST)) - 1)
        tl.store(negative_student_ptr + at, tl.where(log_ratio > MOST, -2 - log_ratio, ratio), mask=inside)
    if GRAD_TEACHER:
        tl.store(negative_teacher_ptr + at, -d, mask=inside)


@triton.jit
def _weighted(z, top_value, z_i, partner, log_sum, negative, mean, CODED: tl.constexpr):
    """Return a tile of P (negative - top_value - mean), where some derivatives are held as logarithms."""
    log_p = (z[None, :] - partner[:, None]) * (z_i * LOG2_E)[:, None] - log_sum[:, None]
    if CODED:
        coded = negative < -1.5
        log_p += tl.where(coded, -2 - negative, 0)
        factor = tl.where(coded, 1, negative - top_value[:, None] - mean[:, None])
    else:
        factor = negative - top_value[:, None] - mean[:, None]
    return tl.exp2(log_p) * factor


@triton.jit
def _means_kernel(
    logits_ptr,
    row_stride,
    stride,
    extremes_ptr,
    log_sums_ptr,
    negative_ptr,
    means_ptr,
    first,
    rows,
    classes,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_j P_ij (negative_ij - negative_i,top) of some rows of one sample. Nothing cancels if the top is nearly 1."""
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    logits_ptr += sample * row_stride
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = first + row
    z_i, top, partner, log_sum = _rows(logits_ptr, stride, extremes_ptr, log_sums_ptr, sample, i, classes)
    negative_ptr += row.to(tl.int64) * classes
    top_value = tl.load(negative_ptr + top, mask=row < rows, other=0)
    means = tl.full((BLOCK,), 0, dtype)
    for start in range(0, classes, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (j < classes)[None, :]
        negative = tl.load(negative_ptr[:, None] + j[None, :], mask=inside, other=0)
        z = _load(logits_ptr, j, stride, classes, dtype)
        terms = _weighted(z, top_value, z_i, partner, log_sum, negative, tl.zeros_like(means), CODED)
        means += tl.sum(tl.where(inside, terms, 0), 1)
    tl.store(means_ptr + sample * classes + i, means, mask=row < rows)


@triton.jit
def _pull_back_kernel(
    logits_ptr,
    row_stride,
    stride,
    extremes_ptr,
    log_sums_ptr,
    negative_ptr,
    means_ptr,
    first,
    rows,
    classes,
    grad_ptr,
    factor: tl.float64,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz_k += Σ_i dA_ik z_i + Σ_j dA_kj z_j, for the rows i of the chunk, and for k if it is in the chunk."""
    dtype: tl.constexpr = log_sums_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    logits_ptr += sample * row_stride
    means_ptr += sample * classes
    grad_ptr += sample * classes
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z_k, top_k, partner_k, log_sum_k = _rows(logits_ptr, stride, extremes_ptr, log_sums_ptr, sample, k, classes)
    total = tl.full((BLOCK,), 0, dtype)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        i = first + row
        inside = (row < rows)[:, None] & (k < classes)[None, :]
        z_i, top, partner, log_sum = _rows(logits_ptr, stride, extremes_ptr, log_sums_ptr, sample, i, classes)
        pointers = negative_ptr + row.to(tl.int64) * classes
        top_value = tl.load(pointers + top, mask=row < rows, other=0)
        mean = tl.load(means_ptr + i, mask=row < rows, other=0)
        negative = tl.load(pointers[:, None] + k[None, :], mask=inside, other=0)
        d_products = _weighted(z_k, top_value, z_i, partner, log_sum, negative, mean, CODED)
        total += tl.sum(tl.where(inside, d_products * z_i[:, None], 0), 0)
    row = k - first
    mine = (row >= 0) & (row < rows)
    pointers = negative_ptr + row.to(tl.int64) * classes
    top_value = tl.load(pointers + top_k, mask=mine, other=0)
    mean = tl.load(means_ptr + k, mask=mine, other=0)
    for start in range(0, classes, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (j < classes)[None, :]
        z_j = _load(logits_ptr, j, stride, classes, dtype)
        negative = tl.load(pointers[:, None] + j[None, :], mask=inside, other=0)
        d_products = _weighted(z_j, top_value, z_k, partner_k, log_sum_k, negative, mean, CODED)
        total += tl.sum(tl.where(inside, d_products * z_j[None, :], 0), 1)
    before = tl.load(grad_ptr + k, mask=k < classes, other=0)
    tl.store(grad_ptr + k, before - total * tl.full((), factor, dtype), mask=k < classes)


@triton.jit
def _log_correlations(z, z_i, partner, log_sum):
    """Return a tile of ln P of one sample."""
    return ((z[None, :] - partner[:, None]) * (z_i * LOG2_E)[:, None] - log_sum[:, None]) * LN_2


@triton.jit
def _samples_kernel(
    student_ptr,
    student_row_stride,
    student_stride,
    student_extremes_ptr,
    student_log_sums_ptr,
    teacher_ptr,
    teacher_row_stride,
    teacher_stride,
    teacher_extremes_ptr,
    teacher_log_sums_ptr,
    tops_ptr,
    means_ptr,
    divergences_ptr,
    classes,
    BLOCK: tl.constexpr,
):
    """KL(p ‖ q) = p · d of some rows of one sample, with d = log(p / q). Also d at the largest p, and p ·
    (d - this d).
    """
    dtype: tl.constexpr = means_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    student_ptr += sample * student_row_stride
    teacher_ptr += sample * teacher_row_stride
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_i, _, s_partner, s_sum = _rows(
        student_ptr, student_stride, student_extremes_ptr, student_log_sums_ptr, sample, i, classes
    )
    t_i, top, t_partner, t_sum = _rows(
        teacher_ptr, teacher_stride, teacher_extremes_ptr, teacher_log_sums_ptr, sample, i, classes
    )
    s_top = tl.load(student_ptr + top.to(tl.int64) * student_stride).to(dtype)
    d_top = (s_sum - t_sum - (s_top - s_partner) * (s_i * LOG2_E)) * LN_2
    divergences = tl.full((BLOCK,), 0, dtype)
    means = tl.full((BLOCK,), 0, dtype)
    for start in range(0, classes, BLOCK):
        j = start + tl.arange(0, BLOCK)
        log_q = _log_correlations(_load(student_ptr, j, student_stride, classes, dtype), s_i, s_partner, s_sum)
        log_p = _log_correlations(_load(teacher_ptr, j, teacher_stride, classes, dtype), t_i, t_partner, t_sum)
        d = log_p - log_q
        p, q = tl.exp2(log_p * LOG2_E), tl.exp2(log_q * LOG2_E)
        terms = tl.where(tl.abs(d) < 0.25, p * _remainder(d), p * d - (p - q))
        divergences += tl.sum(tl.where((j < classes)[None, :], terms, 0), 1)
        means += tl.sum(tl.where((j < classes)[None, :], p * (d - d_top[:, None]), 0), 1)
    tl.store(tops_ptr + sample * classes + i, d_top, mask=i < classes)
    tl.store(means_ptr + sample * classes + i, means, mask=i < classes)
    tl.store(divergences_ptr + sample * classes + i, divergences, mask=i < classes)


@triton.jit
def _samples_backward_kernel(
    student_ptr,
    student_row_stride,
    student_stride,
    student_extremes_ptr,
    student_log_sums_ptr,
    teacher_ptr,
    teacher_row_stride,
    teacher_stride,
    teacher_extremes_ptr,
    teacher_log_sums_ptr,
    tops_ptr,
    means_ptr,
    grad_student_ptr,
    grad_teacher_ptr,
    classes,
    factor: tl.float64,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz_k = Σ_j (dA_kj + dA_jk) z_j of one sample, with q - p and p (log(p / q) - KL) for dA."""
    dtype: tl.constexpr = means_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    student_ptr += sample * student_row_stride
    teacher_ptr += sample * teacher_row_stride
    tops_ptr += sample * classes
    means_ptr += sample * classes
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_k, _, s_partner, s_sum = _rows(
        student_ptr, student_stride, student_extremes_ptr, student_log_sums_ptr, sample, k, classes
    )
    t_k, _, t_partner, t_sum = _rows(
        teacher_ptr, teacher_stride, teacher_extremes_ptr, teacher_log_sums_ptr, sample, k, classes
    )
    top_k = tl.load(tops_ptr + k, mask=k < classes, other=0)
    mean_k = tl.load(means_ptr + k, mask=k < classes, other=0)
    total_s = tl.full((BLOCK,), 0, dtype)
    total_t = tl.full((BLOCK,), 0, dtype)
    for start in range(0, classes, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s_j, _, s_partner_j, s_sum_j = _rows(
            student_ptr, student_stride, student_extremes_ptr, student_log_sums_ptr, sample, j, classes
        )
        t_j, _, t_partner_j, t_sum_j = _rows(
            teacher_ptr, teacher_stride, teacher_extremes_ptr, teacher_log_sums_ptr, sample, j, classes
        )
        top_j = tl.load(tops_ptr + j, mask=j < classes, other=0)
        mean_j = tl.load(means_ptr + j, mask=j < classes, other=0)
        inside = (j < classes)[None, :]
        dq_kj, dp_kj = _derivatives(
            _log_correlations(s_j, s_k, s_partner, s_sum),
            _log_correlations(t_j, t_k, t_partner, t_sum),
            top_k,
            mean_k,
        )
        dq_jk, dp_jk = _derivatives(
            _log_correlations(s_k, s_j, s_partner_j, s_sum_j),
            _log_correlations(t_k, t_j, t_partner_j, t_sum_j),
            top_j,
            mean_j,
        )
        total_s += tl.sum(tl.where(inside, (dq_kj + tl.trans(dq_jk)) * s_j[None, :], 0), 1)
        total_t += tl.sum(tl.where(inside, (dp_kj + tl.trans(dp_jk)) * t_j[None, :], 0), 1)
    factor = tl.full((), factor, dtype)
    if GRAD_STUDENT:
        tl.store(grad_student_ptr + sample * classes + k, total_s * factor, mask=k < classes)
    if GRAD_TEACHER:
        tl.store(grad_teacher_ptr + sample * classes + k, total_t * factor, mask=k < classes)


@triton.jit
def _derivatives(log_q, log_p, top, mean):
    """Return q - p, and p (d - KL), from differences to d at the largest p."""
    d = log_p - log_q
    p = tl.exp2(log_p * LOG2_E)
    difference = tl.where(tl.abs(d) < 0.25, p * (_remainder(d) - d), tl.exp2(log_q * LOG2_E) - p)
    return difference, p * (d - top[:, None] - mean[:, None])
