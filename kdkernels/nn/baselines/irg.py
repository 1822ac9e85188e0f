"""Instance relationship graphs (IRG): distances between samples, and how they change from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks, distributed, groups
from ...ops.shapes import accumulation_dtype
from ...types import Group
from ..base import SettingsModule
from . import shapes

__all__ = ["IRGLoss"]

Pairs = Sequence[tuple[Tensor, Tensor]]
_EPS = 1e-12  # which the authors' program adds to the largest distance


@dataclass(eq=False, repr=False)
class IRGLoss(SettingsModule):
    """Compare squared distances between samples, and their change from layer to layer, IRG (Liu et al. 2019).

    A graph has the samples as vertices and ``A_ij = |x_i − x_j|² / max |x_i − x_j|²`` as edges. The loss is
    ``w_G · (mse(A_S, A_T) + mse(f_S, f_T)) + w_T · Σ (mse(A_S, A_S') − mse(A_T, A_T'))² + (mse(x_S, x_S') −
    mse(x_T, x_T'))²``. The sum is over pairs of layers x and x' of each network. Terms that compare features are left
    out where shapes differ. All means are over all numbers of a tensor. This is the form of SemCKD's trainer.

    Args:
        graph_weight: w_G, the weight of the graph.
        transformation_weight: w_T, the weight of the changes between layers.
        group: the process group that shares the batch, "world" for the default group, or None for one process. Every
            process gathers the features of all processes and computes the whole loss.

    Memory:
        Some b x b matrices, and the features twice in float64.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import IRGLoss
        >>> student, teacher = torch.randn(32, 64, requires_grad=True), torch.randn(32, 128)
        >>> IRGLoss()(student, teacher).backward()  # edges only, because the widths differ
        >>> early, late = torch.randn(32, 8, 4, 4), torch.randn(32, 16, 2, 2)
        >>> IRGLoss()(student, teacher, [(early, late)], [(early, late)]).shape
        torch.Size([])
    """

    _: KW_ONLY
    graph_weight: float = 1.0
    transformation_weight: float = 1.0
    group: Group = None

    def check(self) -> None:
        super().check()
        checks.non_negative("graph_weight", self.graph_weight)
        checks.non_negative("transformation_weight", self.transformation_weight)

    def forward(self, student: Tensor, teacher: Tensor, student_pairs: Pairs = (), teacher_pairs: Pairs = ()) -> Tensor:
        """Return the loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: b x ... features or embeddings.
            teacher: b x ... features or embeddings. They receive a gradient only if they require one.
            student_pairs: pairs of the student's layers, b x ... features each.
            teacher_pairs: as many pairs of the teacher's layers.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        student = checks.tensor("student", student, None, "b x ...")
        features = [student, shapes.features("teacher", teacher, student)]
        pairs = list(student_pairs)
        if len(pairs) != len(teacher_pairs):
            raise ValueError(f"teacher_pairs must hold {len(pairs)} pairs, as student_pairs, got {len(teacher_pairs)}")
        for index, (own, other) in enumerate(zip(pairs, teacher_pairs, strict=True)):
            for name, pair in (("student_pairs", own), ("teacher_pairs", other)):
                layers = shapes.layers(f"{name}[{index}]", pair, 2)
                features += [shapes.features(f"{name}[{index}][{i}]", x, student) for i, x in enumerate(layers)]
        comparable = [a.shape[1:] == b.shape[1:] for a, b in zip(features[::2], features[1::2], strict=True)]
        dtype = accumulation_dtype(*features)
        rows = [x.flatten(1).to(dtype) for x in features]
        group = groups.resolve(self.group)
        with torch.autocast(student.device.type, enabled=False):
            if group is None:
                return self._loss(comparable, *rows)
            terms: dict[str, object] = {"widths": [x.shape[1] for x in rows], "dtype": dtype, "settings": self._weights}
            ranks = distributed.agree(group, len(student), student.device, **terms)
            return distributed.loss_of_all_rows(ranks, lambda *rows: self._loss(comparable, *rows), *rows)

    @property
    def _weights(self) -> tuple[float, float]:
        return self.graph_weight, self.transformation_weight

    def _loss(self, comparable: list[bool], *rows: Tensor) -> Tensor:
        """Return the loss of one process.

        Rows come in twos, which are compared: student and teacher, then a pair of the student's layers, a pair of the
        teacher's layers, and so on.
        """
        exact = [x.double() for x in rows]
        distances = [_distances(x) for x in exact]
        edges = [F.mse_loss(a, b) for a, b in zip(distances[::2], distances[1::2], strict=True)]
        vertices = [
            F.mse_loss(a, b) if same else None for a, b, same in zip(exact[::2], exact[1::2], comparable, strict=True)
        ]
        loss = self.graph_weight * (edges[0] if vertices[0] is None else edges[0] + vertices[0])
        for own in range(1, len(edges), 2):
            change = (edges[own] - edges[own + 1]).square()
            own_vertices, other_vertices = vertices[own], vertices[own + 1]
            if own_vertices is not None and other_vertices is not None:
                change = change + (own_vertices - other_vertices).square()
            loss = loss + self.transformation_weight * change
        return loss.to(rows[0].dtype)


def _distances(rows: Tensor) -> Tensor:
    """Return the squared distances of all pairs, divided by the largest."""
    products = rows @ rows.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=_EPS)
    distances = distances * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return distances / (distances.max() + _EPS)
