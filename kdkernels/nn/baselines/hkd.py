"""Heterogeneous distillation by information flow (HKD): affinities of samples at every layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ... import checks, distributed, groups
from ...ops.shapes import accumulation_dtype
from ...types import Group
from ..base import SettingsModule
from . import shapes

__all__ = ["HKDLoss"]

_EPS = 1e-6  # which the authors' program adds to norms and squared distances


@dataclass(eq=False, repr=False)
class HKDLoss(SettingsModule):
    """Compare the affinities of samples at every layer, HKD (Passalis et al. 2020).

    Two kernels give the affinities of the samples of a batch: ``(1 + cos) / 2`` and ``1 / (1 + |x_i − x_j|)``. Each row
    is divided by its sum. The loss is the sum over layers of their weight times, for both kernels, Jeffreys' divergence
    of the affinities p of the teacher and q of the student: ``mean_ij (p_ij − q_ij)(log p_ij − log q_ij)``.

    HKD trains in two steps. First, an auxiliary network of the student's architecture, with twice its width, learns
    from the teacher's embeddings by ``kdkernels.probabilistic_transfer_loss``. Then the student learns from the layers
    of the auxiliary network by this loss.

    Args:
        weights: the weight of each layer. None is 1 for every layer. The attribute may be changed during training. The
            authors' program gives 1 to the last layer, and 100 · 0.7^epoch to all layers before it.
        group: the process group that shares the batch, "world" for the default group, or None for one process. Every
            process gathers the features of all processes and computes the whole loss.

    Memory:
        Some b x b matrices for each layer, and the features twice in float64.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import HKDLoss
        >>> student = [torch.randn(16, 8, 8, 8, requires_grad=True), torch.randn(16, 32)]
        >>> auxiliary = [torch.randn(16, 16, 8, 8), torch.randn(16, 64)]
        >>> epoch = 3
        >>> HKDLoss(weights=[100 * 0.7**epoch, 1.0])(student, auxiliary).backward()
    """

    _: KW_ONLY
    weights: Sequence[float] | None = None
    group: Group = None

    def check(self) -> None:
        super().check()
        if self.weights is not None:
            for weight in self.weights:
                checks.non_negative("a weight in weights", weight)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: the b x ... features of each layer.
            teacher: the b x ... features of as many layers. They receive a gradient only if they require one.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        students = shapes.layers("student", student)
        teachers = shapes.layers("teacher", teacher, len(students))
        if self.weights is not None and len(self.weights) != len(students):
            raise ValueError(f"weights must hold a number for each of {len(students)} layers, got {self.weights!r}")
        first = checks.tensor("student[0]", students[0], None, "b x ...")
        for name, layers in (("student", students), ("teacher", teachers)):
            for index, layer in enumerate(layers):
                shapes.features(f"{name}[{index}]", layer, first)
        weights = [1.0] * len(students) if self.weights is None else list(self.weights)
        dtype = accumulation_dtype(*students, *teachers)
        rows = [x.flatten(1).to(dtype) for x in (*students, *teachers)]
        group = groups.resolve(self.group)
        with torch.autocast(first.device.type, enabled=False):
            if group is None:
                return _loss(weights, *rows)
            terms: dict[str, object] = {"widths": [x.shape[1] for x in rows], "dtype": dtype, "weights": weights}
            ranks = distributed.agree(group, len(first), first.device, **terms)
            return distributed.loss_of_all_rows(ranks, functools.partial(_loss, weights), *rows)


def _loss(weights: Sequence[float], *rows: Tensor) -> Tensor:
    """Return the loss of one process. The rows are the student's layers, then the teacher's."""
    students, teachers = rows[: len(weights)], rows[len(weights) :]
    losses = []
    for weight, own, other in zip(weights, students, teachers, strict=True):
        pair = own.double(), other.double()
        divergences = [_divergence(kernel(pair[0]), kernel(pair[1])) for kernel in (_cosines, _nearness)]
        losses.append(weight * (divergences[0] + divergences[1]))
    return torch.stack(losses).sum().to(rows[0].dtype)


def _cosines(rows: Tensor) -> Tensor:
    """Return (1 + cos) / 2. A zero row has cosine 0 with every row, and no gradient."""
    squares = rows.square().sum(1, keepdim=True)
    dead = squares == 0
    norms = torch.where(dead, 0.0, torch.where(dead, 1.0, squares).sqrt())
    units = rows / (norms + _EPS)
    return (units @ units.T + 1) / 2


def _nearness(rows: Tensor) -> Tensor:
    """Return 1 / (1 + distance), Student's t kernel."""
    products = rows @ rows.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
    return 1 / (1 + (distances + _EPS).sqrt())


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Jeffreys' divergence of affinities, whose rows are divided by their sums."""
    smallest = torch.finfo(student.dtype).tiny
    q, p = (x.clamp(min=smallest) / x.sum(1, keepdim=True) for x in (student, teacher))
    return ((p - q) * (p.log() - q.log())).mean()
