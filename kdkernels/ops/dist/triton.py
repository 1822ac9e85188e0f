"""Triton kernels of ``dist``: a pass by rows, a pass by columns, and a pass by rows for the gradients.

Both networks' probabilities are held. A class that is not there, and every class of a row that does not count, has -1 in
place of a probability. 1 - r is half the squared distance of two lines with norm 1, so it is precise if r is nearly 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..shapes import loss_and_gradients
from ..tuning import DIST_COLUMNS, DIST_ROWS
from ..tuning import KD_MAX_BLOCK as MAX_BLOCK
from . import fake

LOG2_E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-8)  # is added to the product of two norms


@in_triton(fake.dist)
def _launch(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    beta: float,
    gamma: float,
    temperature: float,
    grad_student: bool,
    grad_teacher: bool,
) -> tuple[Tensor, ...]:
    loss, *gradients = loss_and_gradients(student, teacher, grad_student, grad_teacher)
    rows, classes = student.shape
    block = min(triton.next_power_of_2(classes), MAX_BLOCK)
    warps = max(1, min(block // 256, 8))
    q, p = (student.new_empty((rows, classes), dtype=loss.dtype) for _ in range(2))
    # Per row: 1 - r, three slopes, the mean. Per column: these without the mean, two shifts, two means, the samples.
    of_rows = student.new_empty((5, rows), dtype=torch.float64)
    of_columns = student.new_empty((9, classes), dtype=torch.float64)
    counts = student.new_ones(rows, dtype=torch.bool) if mask is None else mask
    with torch.cuda.device_of(student):
        _rows_kernel[(rows,)](
            student,
            teacher,
            counts,
            q,
            p,
            of_rows,
            rows,
            classes,
            *student.stride(),
            *teacher.stride(),
            counts.stride(0),
            temperature,
            BLOCK=block,
            num_warps=warps,
        )
        _columns_kernel[(triton.cdiv(classes, DIST_COLUMNS),)](
            q, p, of_columns, rows, classes, ROWS=DIST_ROWS, COLUMNS=DIST_COLUMNS
        )
        lines = of_columns[8] > 0
        samples, columns = (x.sum().clamp(min=1).double() for x in (counts, lines))
        inter = torch.where(counts, of_rows[0], 0).sum() / samples
        intra = torch.where(lines, of_columns[0], 0).sum() / columns
        weights = temperature**2 * torch.stack([beta / samples, gamma / columns])
        total = temperature**2 * (beta * inter + gamma * intra)
        for wanted, gradient, own, other, slope in (
            (grad_student, gradients[0], q, p, 0),
            (grad_teacher, gradients[1], p, q, 1),
        ):
            if wanted:
                _gradient_kernel[(rows,)](
                    own,
                    other,
                    of_rows,
                    of_columns,
                    weights,
                    gradient,
                    rows,
                    classes,
                    temperature,
                    NETWORK=slope,
                    BLOCK=block,
                    num_warps=warps,
                )
    return total.to(loss.dtype), *gradients


@triton.jit
def _logits(pointer, stride, columns, classes, counts, dtype: tl.constexpr):
    inside = (columns < classes) & counts
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=inside, other=-float("inf")).to(dtype)


@triton.jit
def _probabilities(pointer, columns, classes):
    """Return the probabilities of a block and whether they are there. Others are 0."""
    value = tl.load(pointer + columns, mask=columns < classes, other=-1)
    there = (value < -0.5) == 0  # NaN is there
    return tl.where(there, value, 0), there


@triton.jit
def _correlation(student, teacher, inverse_s, inverse_t, distance):
    """Return 1 - r and the slopes of r: for both lines, for the student's own line and for the teacher's own line.

    student, teacher: the squared norms of the centred lines. distance: the squared distance of the lines times their
    inverse norms, which are rounded.
    """
    norm_s, norm_t = tl.sqrt(student), tl.sqrt(teacher)
    norms = norm_s * norm_t
    total = norms + EPS
    none = norms == 0
    of_s = tl.where(none, 1, norm_s * inverse_s.to(tl.float64))  # nearly 1
    of_t = tl.where(none, 1, norm_t * inverse_t.to(tl.float64))
    distance = (distance - (of_s - of_t) * (of_s - of_t)) / (of_s * of_t)
    r = tl.where(none, 0, norms * (1 - distance * 0.5) / total)
    difference = tl.where(none, 1, (norms * distance * 0.5 + EPS) / total)
    of_student = tl.where(none, 0, r * norm_t / (tl.where(none, 1, norm_s) * total))
    of_teacher = tl.where(none, 0, r * norm_s / (tl.where(none, 1, norm_t) * total))
    return difference, 1 / total, of_student, of_teacher


@triton.jit
def _rows_kernel(
    student_ptr,
    teacher_ptr,
    counts_ptr,
    q_ptr,
    p_ptr,
    of_rows_ptr,
    rows,
    classes,
    student_row_stride,
    student_stride,
    teacher_row_stride,
    teacher_stride,
    counts_stride,
    temperature: tl.float64,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    q_ptr += row * classes
    p_ptr += row * classes
    counts = tl.load(counts_ptr + row * counts_stride) != 0
    scale = (1 / tl.full((), temperature, tl.float64)).to(dtype) * LOG2_E
    largest_s = tl.full((), -float("inf"), dtype)
    largest_t = tl.full((), -float("inf"), dtype)
    number = tl.full((), 0, tl.int32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _logits(student_ptr, student_stride, columns, classes, counts, dtype)
        t = _logits(teacher_ptr, teacher_stride, columns, classes, counts, dtype)
        largest_s = tl.maximum(largest_s, tl.max(s, 0))
        largest_t = tl.maximum(largest_t, tl.max(t, 0))
        number += tl.sum(((s != -float("inf")) | (t != -float("inf"))).to(tl.int32), 0)
    largest_s = tl.where(counts, largest_s, 0)  # a row without a class gives NaN, unless it does not count
    largest_t = tl.where(counts, largest_t, 0)
    total_s = tl.full((), 0, dtype)
    total_t = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _logits(student_ptr, student_stride, columns, classes, counts, dtype)
        t = _logits(teacher_ptr, teacher_stride, columns, classes, counts, dtype)
        inside = columns < classes
        total_s += tl.sum(tl.where(inside, tl.exp2((s - largest_s) * scale), 0), 0)
        total_t += tl.sum(tl.where(inside, tl.exp2((t - largest_t) * scale), 0), 0)
    inverse_s = 1 / tl.where(counts, total_s, 1)
    inverse_t = 1 / tl.where(counts, total_t, 1)
    mean = 1 / tl.maximum(number, 1).to(dtype)
    norm_s = tl.full((), 0, tl.float64)
    norm_t = tl.full((), 0, tl.float64)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _logits(student_ptr, student_stride, columns, classes, counts, dtype)
        t = _logits(teacher_ptr, teacher_stride, columns, classes, counts, dtype)
        there = (s != -float("inf")) | (t != -float("inf"))
        q = tl.exp2((s - largest_s) * scale) * inverse_s
        p = tl.exp2((t - largest_t) * scale) * inverse_t
        tl.store(q_ptr + columns, tl.where(there, q, -1), mask=columns < classes)
        tl.store(p_ptr + columns, tl.where(there, p, -1), mask=columns < classes)
        q = tl.where(there, q - mean, 0)
        p = tl.where(there, p - mean, 0)
        norm_s += tl.sum(q * q, 0).to(tl.float64)
        norm_t += tl.sum(p * p, 0).to(tl.float64)
    inverse_norm_s = (1 / tl.sqrt(norm_s)).to(dtype)
    inverse_norm_t = (1 / tl.sqrt(norm_t)).to(dtype)
    distance = tl.full((), 0, tl.float64)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _logits(student_ptr, student_stride, columns, classes, counts, dtype)
        t = _logits(teacher_ptr, teacher_stride, columns, classes, counts, dtype)
        there = (s != -float("inf")) | (t != -float("inf"))
        q = tl.exp2((s - largest_s) * scale) * inverse_s
        p = tl.exp2((t - largest_t) * scale) * inverse_t
        d = tl.where(there, (q - mean) * inverse_norm_s - (p - mean) * inverse_norm_t, 0)
        distance += tl.sum(d * d, 0).to(tl.float64)
    difference, of_both, of_student, of_teacher = _correlation(
        norm_s, norm_t, inverse_norm_s, inverse_norm_t, distance
    )
    tl.store(of_rows_ptr + row, difference)
    tl.store(of_rows_ptr + rows + row, of_both)
    tl.store(of_rows_ptr + 2 * rows + row, of_student)
    tl.store(of_rows_ptr + 3 * rows + row, of_teacher)
    tl.store(of_rows_ptr + 4 * rows + row, mean.to(tl.float64))


@triton.jit
def _tile(q_ptr, p_ptr, start, columns, rows, classes, shift_s, shift_t, mean_s, mean_t, ROWS: tl.constexpr):
    """Return some rows of some columns of both networks, relative to shifts and means, and whether they are there."""
    lines = start + tl.arange(0, ROWS)
    at = lines.to(tl.int64)[:, None] * classes + columns[None, :]
    inside = (lines < rows)[:, None] & (columns < classes)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=-1)
    p = tl.load(p_ptr + at, mask=inside, other=-1)
    there = (q < -0.5) == 0
    q = tl.where(there, (q - shift_s[None, :]) - mean_s[None, :], 0)
    p = tl.where(there, (p - shift_t[None, :]) - mean_t[None, :], 0)
    return q, p, there


@triton.jit
def _columns_kernel(q_ptr, p_ptr, of_columns_ptr, rows, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    zero = tl.zeros((COLUMNS,), dtype)
    # Relative to the largest number of a column, equal samples differ by exactly 0.
    shift_s, shift_t = zero - 1, zero - 1
    number = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, rows, ROWS):
        q, p, there = _tile(q_ptr, p_ptr, start, columns, rows, classes, zero, zero, zero, zero, ROWS)
        shift_s = tl.maximum(shift_s, tl.max(tl.where(there, q, -1), 0))
        shift_t = tl.maximum(shift_t, tl.max(tl.where(there, p, -1), 0))
        number += tl.sum(there.to(tl.int32), 0)
    sum_s = tl.zeros((COLUMNS,), tl.float64)
    sum_t = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        q, p, _ = _tile(q_ptr, p_ptr, start, columns, rows, classes, shift_s, shift_t, zero, zero, ROWS)
        sum_s += tl.sum(q, 0).to(tl.float64)
        sum_t += tl.sum(p, 0).to(tl.float64)
    samples = tl.maximum(number, 1).to(tl.float64)
    mean_s = (sum_s / samples).to(dtype)
    mean_t = (sum_t / samples).to(dtype)
    norm_s = tl.zeros((COLUMNS,), tl.float64)
    norm_t = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        q, p, _ = _tile(q_ptr, p_ptr, start, columns, rows, classes, shift_s, shift_t, mean_s, mean_t, ROWS)
        norm_s += tl.sum(q * q, 0).to(tl.float64)
        norm_t += tl.sum(p * p, 0).to(tl.float64)
    inverse_s = (1 / tl.sqrt(norm_s)).to(dtype)
    inverse_t = (1 / tl.sqrt(norm_t)).to(dtype)
    distance = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        q, p, _ = _tile(q_ptr, p_ptr, start, columns, rows, classes, shift_s, shift_t, mean_s, mean_t, ROWS)
        d = q * inverse_s[None, :] - p * inverse_t[None, :]
        distance += tl.sum(d * d, 0).to(tl.float64)
    difference, of_both, of_student, of_teacher = _correlation(norm_s, norm_t, inverse_s, inverse_t, distance)
    inside = columns < classes
    of_columns_ptr += columns
    tl.store(of_columns_ptr, difference, mask=inside)
    tl.store(of_columns_ptr + classes, of_both, mask=inside)
    tl.store(of_columns_ptr + 2 * classes, of_student, mask=inside)
    tl.store(of_columns_ptr + 3 * classes, of_teacher, mask=inside)
    tl.store(of_columns_ptr + 4 * classes, shift_s.to(tl.float64), mask=inside)
    tl.store(of_columns_ptr + 5 * classes, shift_t.to(tl.float64), mask=inside)
    tl.store(of_columns_ptr + 6 * classes, mean_s.to(tl.float64), mask=inside)
    tl.store(of_columns_ptr + 7 * classes, mean_t.to(tl.float64), mask=inside)
    tl.store(of_columns_ptr + 8 * classes, number.to(tl.float64), mask=inside)


@triton.jit
def _slopes(
    own_ptr, other_ptr, of_columns_ptr, columns, classes, mean, row_both, row_own, weight, NETWORK: tl.constexpr
):
    """Return the negative gradient to the probabilities of a block, the probabilities, and whether they are there."""
    dtype: tl.constexpr = own_ptr.dtype.element_ty
    own, there = _probabilities(own_ptr, columns, classes)
    other, _ = _probabilities(other_ptr, columns, classes)
    inside = columns < classes
    at = of_columns_ptr + columns
    both = (weight * tl.load(at + classes, mask=inside, other=0)).to(dtype)
    of_own = (weight * tl.load(at + (2 + NETWORK) * classes, mask=inside, other=0)).to(dtype)
    shift_own = tl.load(at + (4 + NETWORK) * classes, mask=inside, other=0).to(dtype)
    shift_other = tl.load(at + (5 - NETWORK) * classes, mask=inside, other=0).to(dtype)
    mean_own = tl.load(at + (6 + NETWORK) * classes, mask=inside, other=0).to(dtype)
    mean_other = tl.load(at + (7 - NETWORK) * classes, mask=inside, other=0).to(dtype)
    of_row = row_both * (other - mean) - row_own * (own - mean)
    return of_row + both * ((other - shift_other) - mean_other) - of_own * ((own - shift_own) - mean_own), own, there


@triton.jit
def _gradient_kernel(
    own_ptr,
    other_ptr,
    of_rows_ptr,
    of_columns_ptr,
    weights_ptr,
    grad_ptr,
    rows,
    classes,
    temperature: tl.float64,
    NETWORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one row to one network's logits: own (mean of w - w) / T, where the gradient to the
    probabilities is -w. It is taken relative to the largest class, so nothing cancels if its probability is nearly 1.
    """
    dtype: tl.constexpr = own_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    own_ptr += row * classes
    other_ptr += row * classes
    grad_ptr += row * classes
    of_rows_ptr += row
    of_row, of_column = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    both = (of_row * tl.load(of_rows_ptr + rows)).to(dtype)
    of_own = (of_row * tl.load(of_rows_ptr + (2 + NETWORK) * rows)).to(dtype)
    mean = tl.load(of_rows_ptr + 4 * rows).to(dtype)
    largest = tl.full((), -1, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        own, _ = _probabilities(own_ptr, columns, classes)
        largest = tl.maximum(largest, tl.max(own, 0))
    top = tl.full((), -float("inf"), dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        w, own, there = _slopes(
            own_ptr, other_ptr, of_columns_ptr, columns, classes, mean, both, of_own, of_column, NETWORK
        )
        top = tl.maximum(top, tl.max(tl.where(there & (own == largest), w, -float("inf")), 0))
    top = tl.where(top == -float("inf"), 0, top)
    total = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        w, own, there = _slopes(
            own_ptr, other_ptr, of_columns_ptr, columns, classes, mean, both, of_own, of_column, NETWORK
        )
        total += tl.sum(tl.where(there, own * (w - top), 0), 0)
    inverse = (1 / tl.full((), temperature, tl.float64)).to(dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        w, own, there = _slopes(
            own_ptr, other_ptr, of_columns_ptr, columns, classes, mean, both, of_own, of_column, NETWORK
        )
        gradient = tl.where(there, own * (total - (w - top)) * inverse, 0)
        tl.store(grad_ptr + columns, gradient, mask=columns < classes)
