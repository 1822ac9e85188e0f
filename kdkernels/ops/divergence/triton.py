"""Triton kernels of ``divergence``: one program per row reads both rows in blocks, for the divergence or the gradients.

p and q are the softmax of the exponents ``slope · (logit - max)`` of two rows x and y. KL(p, q) is the forward
divergence if x is the teacher's row, and the reverse divergence if x is the student's row. JSD takes x from the
teacher.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..tuning import block_of_classes
from . import fake
from .reference import STANDARD_EPS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # so that -inf minus the largest logit is -inf
EPS = tl.constexpr(STANDARD_EPS)
INFINITY = tl.constexpr(float("inf"))


@in_triton(fake.divergence)
def _launch(
    student: Tensor, teacher: Tensor, temperatures: Tensor, kind: int, beta: float, standardize: bool, moments: bool
) -> tuple[Tensor, Tensor]:
    losses, saved = fake.divergence.fake(student, teacher, temperatures, kind, beta, standardize, moments)
    x, y = (student, teacher) if kind == 1 else (teacher, student)
    outer, inner, classes = student.shape
    with torch.cuda.device_of(student):
        _divergence_kernel[(outer * inner,)](
            x,
            y,
            temperatures,
            losses,
            saved,
            inner,
            classes,
            saved.shape[2],
            *x.stride(),
            *y.stride(),
            *temperatures.stride(),
            beta,
            JSD=kind == 2,
            STANDARDIZE=standardize,
            MOMENTS=moments,
            **block_of_classes(classes, saved.dtype),
        )
    return losses, saved


@in_triton(fake.divergence_backward)
def _launch_backward(
    grad_losses: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperatures: Tensor,
    saved: Tensor,
    kind: int,
    beta: float,
    standardize: bool,
    moments: bool,
    grad_student: bool,
    grad_teacher: bool,
    to_temperatures: bool,
) -> tuple[Tensor, ...]:
    gradients = fake.new_rows(student, grad_student), fake.new_rows(teacher, grad_teacher)
    of_temperatures = temperatures.new_empty(temperatures.shape if to_temperatures else (0,), dtype=saved.dtype)
    pairs = [(student, gradients[0], grad_student), (teacher, gradients[1], grad_teacher)]
    (x, grad_x, want_x), (y, grad_y, want_y) = pairs if kind == 1 else pairs[::-1]
    outer, inner, classes = student.shape
    saved = saved.contiguous()
    with torch.cuda.device_of(student):
        _divergence_backward_kernel[(outer * inner,)](
            grad_losses,
            x,
            y,
            temperatures,
            saved,
            grad_x,
            grad_y,
            of_temperatures,
            inner,
            classes,
            saved.shape[2],
            *grad_losses.stride(),
            *x.stride(),
            *y.stride(),
            *temperatures.stride(),
            *(grad_x.stride() if want_x else (0, 0, 0)),
            *(grad_y.stride() if want_y else (0, 0, 0)),
            beta,
            JSD=kind == 2,
            STANDARDIZE=standardize,
            MOMENTS=moments,
            GRAD_X=want_x,
            GRAD_Y=want_y,
            GRAD_TEMPERATURE=to_temperatures,
            **block_of_classes(classes, saved.dtype),
        )
    return *gradients, of_temperatures


@triton.jit
def _rounded(numbers, pointer):
    """Return numbers in the type that a pointer points to.

    Triton's interpreter makes zeros of float64 numbers that it should round to bfloat16. It rounds float32 numbers.
    """
    element: tl.constexpr = pointer.dtype.element_ty
    if element.primitive_bitwidth == 16:
        numbers = numbers.to(tl.float32)
    return numbers.to(element)


@triton.jit
def _load(pointer, stride, columns, classes, dtype: tl.constexpr):
    """Return logits, and -inf after the end of the row."""
    return tl.load(pointer + columns.to(tl.int64) * stride, mask=columns < classes, other=-INFINITY).to(dtype)


@triton.jit
def _measured(pointer, stride, classes, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return mean, standard deviation and number of the logits above -inf."""
    total = tl.full((), 0, dtype)
    count = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        z = _load(pointer, stride, start + tl.arange(0, BLOCK), classes, dtype)
        absent = z == -INFINITY
        total += tl.sum(tl.where(absent, 0, z), 0)
        count += tl.sum(tl.where(absent, 0, 1).to(dtype), 0)
    mean = total / count
    squares = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        z = _load(pointer, stride, start + tl.arange(0, BLOCK), classes, dtype)
        centred = tl.where(z == -INFINITY, 0, z - mean)
        squares += tl.sum(centred * centred, 0)
    return mean, tl.sqrt(squares / tl.maximum(count - 1, 1)), count


@triton.jit
def _add_to_sum(largest, total, z, scale):
    """Add one block to a running sum of exponentials below the largest logit."""
    new = tl.maximum(largest, tl.max(z, 0))
    return new, total * tl.exp2((largest - new) * scale) + tl.sum(tl.exp2((z - new) * scale), 0)


@triton.jit
def _log_ratios(below_x, below_y, x, y, slope_x, slope_y, difference):
    """Return log(p / q), which is infinite where only one network has the class, and 0 where none has it."""
    ratio = below_x * slope_x - below_y * slope_y + difference
    no_p = x == -INFINITY
    no_q = y == -INFINITY
    return tl.where(no_p, tl.where(no_q, 0, -INFINITY), tl.where(no_q, INFINITY, ratio))


@triton.jit
def _to_mixture(ratio, beta, dtype: tl.constexpr):
    """Return log(p / m) and log(q / m) from log(p / q), with m = beta p + (1 - beta) q. Infinite logarithms are 0."""
    larger_p = ratio >= 0
    distance = tl.abs(ratio)
    of_smaller = tl.where(larger_p, 1 - beta, beta)
    above = tl.exp2(-distance * LOG2_E) - 1
    if dtype == tl.float32:  # near 0, the difference has few digits
        near = distance < 0.125
        d = tl.where(near, distance, 0)
        series = -d * (1 - d / 2 * (1 - d / 3 * (1 - d / 4 * (1 - d / 5 * (1 - d / 6)))))
        above = tl.where(near, series, above)
    above = above * of_smaller
    x = tl.maximum(1 + above, 1 - of_smaller)
    one = x == 1
    log = tl.where(one, above, tl.log(x) * (above / tl.where(one, 1, x - 1)))
    u = tl.where(larger_p, -log, ratio - log)
    v = tl.where(larger_p, -log - ratio, -log)
    return tl.where(ratio == -INFINITY, 0, u), tl.where(ratio == INFINITY, 0, v)


@triton.jit
def _divergence_kernel(
    x_ptr,
    y_ptr,
    temperatures_ptr,
    losses_ptr,
    saved_ptr,
    inner,
    classes,
    numbers,
    x_outer,
    x_inner,
    x_stride,
    y_outer,
    y_inner,
    y_stride,
    temperature_outer,
    temperature_inner,
    beta: tl.float64,
    JSD: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = row // inner
    j = row % inner
    x_ptr += i * x_outer + j * x_inner
    y_ptr += i * y_outer + j * y_inner
    saved_ptr += row * numbers
    beta = tl.full((), beta, dtype)
    temperature = tl.load(temperatures_ptr + i * temperature_outer + j * temperature_inner).to(dtype)
    counts = temperature != 0
    temperature = tl.where((temperature > 0) & (temperature < INFINITY), temperature, float("nan"))
    classes = tl.where(counts, classes, 0)  # a row that does not count is not read

    slope_x = 1 / temperature
    slope_y = 1 / temperature
    if STANDARDIZE:
        centre_x, deviation_x, count_x = _measured(x_ptr, x_stride, classes, dtype, BLOCK)
        centre_y, deviation_y, count_y = _measured(y_ptr, y_stride, classes, dtype, BLOCK)
        slope_x = slope_x / (deviation_x + EPS)
        slope_y = slope_y / (deviation_y + EPS)

    # A comparison with NaN is false, so NaN reaches the result through the sums.
    largest_x = tl.full((), LOWEST, dtype)
    largest_y = tl.full((), LOWEST, dtype)
    total_x = tl.full((), 0, dtype)
    total_y = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, x_stride, columns, classes, dtype)
        y = _load(y_ptr, y_stride, columns, classes, dtype)
        largest_x, total_x = _add_to_sum(largest_x, total_x, x, slope_x * LOG2_E)
        largest_y, total_y = _add_to_sum(largest_y, total_y, y, slope_y * LOG2_E)
    log_sum_x = tl.where(total_x > 0, tl.log2(total_x), float("nan"))  # 0: all logits are -inf
    log_sum_y = tl.where(total_y > 0, tl.log2(total_y), float("nan"))
    difference = (log_sum_y - log_sum_x) * LN_2

    # Logarithms are relative to the class with the largest p. If its p is nearly 1, the divergence is nearly its
    # logarithm, and the difference would cancel.
    top_y = tl.full((), -INFINITY, dtype)
    if MOMENTS and not JSD:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(x_ptr, x_stride, columns, classes, dtype)
            y = _load(y_ptr, y_stride, columns, classes, dtype)
            top_y = tl.maximum(top_y, tl.max(tl.where(x == largest_x, y, -INFINITY), 0))
        top_y = tl.where(top_y == -INFINITY, largest_y, top_y)
    shift = difference - (top_y - largest_y) * slope_y

    loss = tl.full((), 0, dtype)
    ratio_p = tl.full((), 0, dtype)
    ratio_q = tl.full((), 0, dtype)
    exponent_p = tl.full((), 0, dtype)
    exponent_q = tl.full((), 0, dtype)
    moment_p = tl.full((), 0, dtype)
    moment_q = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, x_stride, columns, classes, dtype)
        y = _load(y_ptr, y_stride, columns, classes, dtype)
        below_x = x - largest_x
        below_y = y - largest_y
        p = tl.exp2(below_x * (slope_x * LOG2_E) - log_sum_x)
        q = tl.exp2(below_y * (slope_y * LOG2_E) - log_sum_y)
        ratio = _log_ratios(below_x, below_y, x, y, slope_x, slope_y, difference)
        a = tl.where(x == -INFINITY, 0, below_x * slope_x)
        b = tl.where(y == -INFINITY, 0, below_y * slope_y)
        if JSD:
            u, v = _to_mixture(ratio, beta, dtype)
            loss += tl.sum(beta * p * u + (1 - beta) * q * v, 0)
            if MOMENTS:
                ratio_p += tl.sum(p * u, 0)
                ratio_q += tl.sum(q * v, 0)
                moment_p += tl.sum(p * u * a, 0)
                moment_q += tl.sum(q * v * b, 0)
                exponent_q += tl.sum(q * b, 0)
        else:
            absent = (x == -INFINITY) | ((p == 0) & (ratio < 0))
            loss += tl.sum(tl.where(absent, 0, tl.where(ratio == INFINITY, INFINITY, p * ratio)), 0)
            if MOMENTS:
                r = below_x * slope_x - (y - top_y) * slope_y
                r = tl.where(absent, 0, tl.where(ratio == INFINITY, -shift, r))
                ratio_p += tl.sum(p * r, 0)
                moment_p += tl.sum(p * r * a, 0)
                moment_q += tl.sum((q - p) * b, 0)
        if MOMENTS:
            exponent_p += tl.sum(p * a, 0)
    loss += 0 * (log_sum_x + log_sum_y)
    tl.store(losses_ptr + row, tl.where(counts, loss, 0))
    broken = loss != loss  # then all gradients of the row are NaN
    tl.store(saved_ptr, largest_x)
    tl.store(saved_ptr + 1, largest_y)
    tl.store(saved_ptr + 2, tl.where(broken, float("nan"), log_sum_x))
    tl.store(saved_ptr + 3, tl.where(broken, float("nan"), log_sum_y))
    tl.store(saved_ptr + 4, tl.full((), 0, dtype))
    if MOMENTS:
        moment_p = moment_p - ratio_p * exponent_p
        if JSD:
            moment_p = moment_p * beta
            moment_q = (moment_q - ratio_q * exponent_q) * (1 - beta)
        tl.store(saved_ptr + 5, top_y)
        tl.store(saved_ptr + 6, ratio_p)
        tl.store(saved_ptr + 7, ratio_q)
        tl.store(saved_ptr + 8, moment_p)
        tl.store(saved_ptr + 9, moment_q)
        if STANDARDIZE:
            tl.store(saved_ptr + 10, centre_x)
            tl.store(saved_ptr + 11, centre_y)
            tl.store(saved_ptr + 12, deviation_x)
            tl.store(saved_ptr + 13, deviation_y)
            tl.store(saved_ptr + 14, count_x)
            tl.store(saved_ptr + 15, count_y)
        else:
            for unused in tl.static_range(10, 16):  # results of a kernel do not depend on what was in memory
                tl.store(saved_ptr + unused, tl.full((), 0, dtype))


@triton.jit
def _divergence_backward_kernel(
    grad_losses_ptr,
    x_ptr,
    y_ptr,
    temperatures_ptr,
    saved_ptr,
    grad_x_ptr,
    grad_y_ptr,
    grad_temperatures_ptr,
    inner,
    classes,
    numbers,
    grad_outer,
    grad_inner,
    x_outer,
    x_inner,
    x_stride,
    y_outer,
    y_inner,
    y_stride,
    temperature_outer,
    temperature_inner,
    grad_x_outer,
    grad_x_inner,
    grad_x_stride,
    grad_y_outer,
    grad_y_inner,
    grad_y_stride,
    beta: tl.float64,
    JSD: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    MOMENTS: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    GRAD_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = saved_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = row // inner
    j = row % inner
    x_ptr += i * x_outer + j * x_inner
    y_ptr += i * y_outer + j * y_inner
    grad_x_ptr += i * grad_x_outer + j * grad_x_inner
    grad_y_ptr += i * grad_y_outer + j * grad_y_inner
    saved_ptr += row * numbers
    beta = tl.full((), beta, dtype)
    factor = tl.load(grad_losses_ptr + i * grad_outer + j * grad_inner).to(dtype)
    temperature = tl.load(temperatures_ptr + i * temperature_outer + j * temperature_inner).to(dtype)
    counts = temperature != 0
    temperature = tl.where((temperature > 0) & (temperature < INFINITY), temperature, float("nan"))

    largest_x = tl.load(saved_ptr)
    largest_y = tl.load(saved_ptr + 1)
    log_sum_x = tl.load(saved_ptr + 2)
    log_sum_y = tl.load(saved_ptr + 3)
    difference = (log_sum_y - log_sum_x) * LN_2
    slope_x = 1 / temperature
    slope_y = 1 / temperature
    top_y = largest_y
    ratio_p = tl.full((), 0, dtype)
    ratio_q = tl.full((), 0, dtype)
    moment_p = tl.full((), 0, dtype)
    moment_q = tl.full((), 0, dtype)
    if MOMENTS:
        top_y = tl.load(saved_ptr + 5)
        ratio_p = tl.load(saved_ptr + 6)
        ratio_q = tl.load(saved_ptr + 7)
        moment_p = tl.load(saved_ptr + 8)
        moment_q = tl.load(saved_ptr + 9)
    if STANDARDIZE:
        centre_x = tl.load(saved_ptr + 10)
        centre_y = tl.load(saved_ptr + 11)
        deviation_x = tl.load(saved_ptr + 12)
        deviation_y = tl.load(saved_ptr + 13)
        count_x = tl.load(saved_ptr + 14)
        count_y = tl.load(saved_ptr + 15)
        slope_x = slope_x / (deviation_x + EPS)
        slope_y = slope_y / (deviation_y + EPS)
        # The gradient of the standard deviation.
        spread_x = factor * moment_p / (tl.maximum(count_x - 1, 1) * deviation_x * (deviation_x + EPS))
        spread_y = factor * moment_q / (tl.maximum(count_y - 1, 1) * deviation_y * (deviation_y + EPS))
        spread_x = tl.where(deviation_x == 0, 0, spread_x)
        spread_y = tl.where(deviation_y == 0, 0, spread_y)
    shift = difference - (top_y - largest_y) * slope_y
    if GRAD_TEMPERATURE:
        gradient = -factor * (moment_p + moment_q) / temperature
        tl.store(grad_temperatures_ptr + row, tl.where(counts, gradient, 0))

    if GRAD_X or GRAD_Y:
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(x_ptr, x_stride, columns, classes, dtype)
            y = _load(y_ptr, y_stride, columns, classes, dtype)
            below_x = x - largest_x
            below_y = y - largest_y
            p = tl.exp2(below_x * (slope_x * LOG2_E) - log_sum_x)
            q = tl.exp2(below_y * (slope_y * LOG2_E) - log_sum_y)
            ratio = _log_ratios(below_x, below_y, x, y, slope_x, slope_y, difference)
            if JSD:
                u, v = _to_mixture(ratio, beta, dtype)
                grad_x = beta * p * (u - ratio_p)
                grad_y = (1 - beta) * q * (v - ratio_q)
            else:
                absent = (x == -INFINITY) | ((p == 0) & (ratio < 0))
                r = below_x * slope_x - (y - top_y) * slope_y
                r = tl.where(absent, 0, tl.where(ratio == INFINITY, -shift, r))
                grad_x = p * (r - ratio_p)
                grad_y = q - p
            if GRAD_X:
                grad_x = grad_x * (factor * slope_x)
                if STANDARDIZE:
                    grad_x -= tl.where(x == -INFINITY, 0, spread_x * (x - centre_x))
                grad_x = _rounded(tl.where(counts, grad_x, 0), grad_x_ptr)
                tl.store(grad_x_ptr + columns.to(tl.int64) * grad_x_stride, grad_x, mask=columns < classes)
            if GRAD_Y:
                grad_y = grad_y * (factor * slope_y)
                if STANDARDIZE:
                    grad_y -= tl.where(y == -INFINITY, 0, spread_y * (y - centre_y))
                grad_y = _rounded(tl.where(counts, grad_y, 0), grad_y_ptr)
                tl.store(grad_y_ptr + columns.to(tl.int64) * grad_y_stride, grad_y, mask=columns < classes)
