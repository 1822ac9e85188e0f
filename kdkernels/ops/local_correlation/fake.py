"""The schemas of ``local_correlation`` and the shapes of its results."""

from __future__ import annotations

from torch import Tensor

from ..operator import kernel
from ..shapes import accumulation_dtype, new_maps
from .boundary import check_local_correlation, check_local_correlation_backward


@kernel(
    "local_correlation(Tensor[] students, Tensor[] teachers, Tensor[] masks, int[] k, float[] weights,"
    " bool mean, int[] plans, float? threshold, bool resize, float eps, int[] wanted, bool tf32=False)"
    " -> (Tensor loss, Tensor[] grad_rows)",
    check=check_local_correlation,
)
def local_correlation(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    k: list[int],
    weights: list[float],
    mean: bool,
    plans: list[int],
    threshold: float | None,
    resize: bool,
    eps: float,
    wanted: list[int],
    tf32: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    dtypes = [accumulation_dtype(*stage) for stage in zip(students, teachers, strict=True)]
    grads = []
    for i, (features, want) in enumerate(zip([*students, *teachers], wanted, strict=True)):
        side = k[i % len(k)]
        n, c, h, w = features.shape
        shape = (n * side**2, c * -(-h // side) * -(-w // side)) if want else (0,)
        grads.append(features.new_empty(shape, dtype=dtypes[i % len(k)]))
    return students[0].new_empty((), dtype=accumulation_dtype(*students, *teachers)), grads


@kernel(
    "local_correlation_backward(Tensor grad_loss, Tensor[] grad_rows, int[] shapes, Tensor[] masks, int[] k,"
    " float? threshold, bool resize) -> Tensor[] grad_features",
    check=check_local_correlation_backward,
)
def local_correlation_backward(
    grad_loss: Tensor,
    grad_rows: list[Tensor],
    shapes: list[int],
    masks: list[Tensor],
    k: list[int],
    threshold: float | None,
    resize: bool,
) -> list[Tensor]:
    return [
        new_maps(rows, shapes[4 * i : 4 * i + 4], k[i % len(k)]) if rows.dim() == 2 else rows.new_empty((0,))
        for i, rows in enumerate(grad_rows)
    ]
