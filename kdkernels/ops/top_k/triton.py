"""Triton kernels of ``top_k``: one program per row, which compares each block of classes with the teacher's classes.

An index that is no class gives NaN. On a GPU, a check would wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import in_triton
from ..tuning import block_of_classes
from . import fake

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # so that -inf minus the largest logit is -inf
INFINITY = tl.constexpr(float("inf"))


@in_triton(fake.top_k)
def _launch(student: Tensor, indices: Tensor, temperatures: Tensor) -> Tensor:
    exponents: Tensor = fake.top_k.fake(student, indices, temperatures)
    with torch.cuda.device_of(student):
        _top_k_kernel[(len(student),)](
            student,
            indices,
            temperatures,
            exponents,
            student.shape[1],
            indices.shape[1],
            *student.stride(),
            *indices.stride(),
            *temperatures.stride(),
            **block_of_classes(student.shape[1], student.dtype),
        )
    return exponents


@in_triton(fake.top_k_backward)
def _launch_backward(
    grad_exponents: Tensor,
    student: Tensor,
    indices: Tensor,
    temperatures: Tensor,
    grad_student: bool,
    to_temperatures: bool,
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = fake.top_k_backward.fake(
        grad_exponents, student, indices, temperatures, grad_student, to_temperatures
    )
    with torch.cuda.device_of(student):
        _top_k_backward_kernel[(len(student),)](
            grad_exponents,
            student,
            indices,
            temperatures,
            *gradients,
            student.shape[1],
            indices.shape[1],
            *grad_exponents.stride(),
            *student.stride(),
            *indices.stride(),
            *temperatures.stride(),
            GRAD_STUDENT=grad_student,
            GRAD_TEMPERATURE=to_temperatures,
            **block_of_classes(student.shape[1], student.dtype),
        )
    return gradients


@triton.jit
def _others(student_ptr, stride, indices_ptr, index_stride, columns, classes, count, dtype: tl.constexpr):
    """Return which columns are classes that the teacher does not name, and their logits. The others get -inf."""
    named = columns >= classes
    for i in range(count):
        named = named | (columns == tl.load(indices_ptr + i * index_stride))
    logit = tl.load(student_ptr + columns.to(tl.int64) * stride, mask=named == 0, other=-INFINITY).to(dtype)
    return named == 0, logit


@triton.jit
def _chosen(student_ptr, stride, indices_ptr, index_stride, places, classes, count, dtype: tl.constexpr):
    """Return the teacher's classes at these places, and the student's logits of them."""
    index = tl.load(indices_ptr + places * index_stride, mask=places < count, other=-1)
    known = (index >= 0) & (index < classes)
    logit = tl.load(student_ptr + index * stride, mask=known, other=0).to(dtype)
    return index, known, tl.where(known, logit, float("nan"))


@triton.jit
def _log_sum(
    student_ptr, stride, indices_ptr, index_stride, classes, count, scale, dtype: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the largest logit of the other classes, and the sum of their exponentials below it.

    A comparison with NaN is false, so NaN reaches the result through the sum.
    """
    largest = tl.full((), LOWEST, dtype)
    total = tl.full((), 0, dtype)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, z = _others(student_ptr, stride, indices_ptr, index_stride, columns, classes, count, dtype)
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp2((before - largest) * scale) + tl.sum(tl.exp2((z - largest) * scale), 0)
    return largest, total


@triton.jit
def _top_k_kernel(
    student_ptr,
    indices_ptr,
    temperatures_ptr,
    exponents_ptr,
    classes,
    count,
    row_stride,
    stride,
    index_row_stride,
    index_stride,
    temperature_stride,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = exponents_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * row_stride
    indices_ptr += row * index_row_stride
    exponents_ptr += row * (count + 1)
    temperature = tl.load(temperatures_ptr + row * temperature_stride).to(tl.float64)
    counts = temperature != 0
    inverse = 1 / tl.where(counts, temperature, 1)
    largest, total = _log_sum(
        student_ptr, stride, indices_ptr, index_stride, classes, count, (inverse * LOG2_E).to(DTYPE), DTYPE, BLOCK
    )
    none = total == 0
    log_sum = largest.to(tl.float64) * inverse + tl.log(tl.where(none, 1, total).to(tl.float64))
    log_sum = tl.where(none, -INFINITY, log_sum)
    tl.store(exponents_ptr + count, tl.where(counts, log_sum, 0).to(DTYPE))
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        _, _, logit = _chosen(student_ptr, stride, indices_ptr, index_stride, places, classes, count, DTYPE)
        exponent = tl.where(counts, logit * inverse.to(DTYPE), 0)
        tl.store(exponents_ptr + places, exponent, mask=places < count)


@triton.jit
def _top_k_backward_kernel(
    grad_exponents_ptr,
    student_ptr,
    indices_ptr,
    temperatures_ptr,
    grad_student_ptr,
    grad_temperatures_ptr,
    classes,
    count,
    grad_row_stride,
    grad_stride,
    row_stride,
    stride,
    index_row_stride,
    index_stride,
    temperature_stride,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = grad_exponents_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    grad_exponents_ptr += row * grad_row_stride
    student_ptr += row * row_stride
    grad_student_ptr += row * classes
    indices_ptr += row * index_row_stride
    temperature = tl.load(temperatures_ptr + row * temperature_stride).to(tl.float64)
    counts = temperature != 0
    inverse_temperature = 1 / tl.where(counts, temperature, 1)
    inverse = inverse_temperature.to(DTYPE)
    scale = (inverse_temperature * LOG2_E).to(DTYPE)
    largest, total = _log_sum(student_ptr, stride, indices_ptr, index_stride, classes, count, scale, DTYPE, BLOCK)
    none = total == 0
    inverse_total = tl.where(none, 0, 1 / tl.where(none, 1, total))

    # The log-sum-exp has the softmax as its derivative. `mean` is the mean of the exponents below the largest.
    of_others = tl.where(counts, tl.load(grad_exponents_ptr + count * grad_stride), 0)
    mean = tl.full((), 0, DTYPE)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        others, z = _others(student_ptr, stride, indices_ptr, index_stride, columns, classes, count, DTYPE)
        p = tl.exp2((z - largest) * scale) * inverse_total
        mean += tl.sum(tl.where(p == 0, 0, p * ((z - largest) * inverse)), 0)
        if GRAD_STUDENT:
            gradient = tl.where(counts, of_others * p * inverse, 0)
            tl.store(grad_student_ptr + columns, gradient, mask=others)
    moment = of_others * tl.where(none, 0, largest * inverse + mean)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        index, known, logit = _chosen(student_ptr, stride, indices_ptr, index_stride, places, classes, count, DTYPE)
        g = tl.load(grad_exponents_ptr + places * grad_stride, mask=places < count, other=0)
        g = tl.where(counts, g, 0)
        exponent = tl.where((logit == -INFINITY) | (places >= count), 0, logit * inverse)
        moment += tl.sum(g * exponent, 0)
        if GRAD_STUDENT:
            tl.store(grad_student_ptr + index, g * inverse, mask=known)
    if GRAD_TEMPERATURE:
        tl.store(grad_temperatures_ptr + row, tl.where(counts, -moment * inverse, 0))
