"""Local correlation consistency in NumPy float64, written from the equations. The package is tested against it.

It shares no code with the package. The loss is a loop over pairs of patches. The gradient is written by hand and
checked against central differences. ``eager`` is what a user would write in PyTorch. Half precision is compared with
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import floor

import numpy as np
import torch
from torch import Tensor


def resampler(start: int, end: int, length: int, size: int) -> np.ndarray:
    """Return the size x length matrix that resamples ``[start, end)`` bilinearly to ``size`` points,
    align_corners=False.
    """
    matrix = np.zeros((size, length))
    inside = end - start
    for i in range(size):
        source = max((i + 0.5) * inside / size - 0.5, 0.0)
        low = floor(source)
        matrix[i, start + low] += 1 - (source - low)
        matrix[i, start + min(low + 1, inside - 1)] += source - low
    return matrix


def box(mask: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """Return the tight half-open bounds of ``mask > threshold`` of one image, or of the whole map if nothing exceeds
    it.
    """
    above = [(i, j) for i, j in product(*map(range, mask.shape)) if not mask[i, j] <= threshold]
    if not above:
        return 0, mask.shape[0], 0, mask.shape[1]
    rows, columns = zip(*above, strict=True)
    return min(rows), max(rows) + 1, min(columns), max(columns) + 1


def scaled(start: int, end: int, length: int, size: int) -> tuple[int, int]:
    """Return bounds on ``length`` pixels scaled to ``size`` pixels and widened to whole pixels."""
    return start * size // length, -(-end * size // length)


@dataclass
class Patches:
    """The unit patch vectors of one network's map, and the gradient through them."""

    features: np.ndarray  # n x c x h x w
    k: int
    mask: np.ndarray | None = None  # n x h' x w'
    threshold: float | None = None
    partition: str = "exact"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        n, c, h, w = self.features.shape
        self.weight = np.ones((n, h, w))
        self.vertical, self.horizontal = [np.eye(h)] * n, [np.eye(w)] * n
        if self.mask is not None:
            above, left = self.mask.shape[1:]
            self.weight = np.stack(
                [resampler(0, above, above, h) @ image @ resampler(0, left, left, w).T for image in self.mask]
            )
        if self.threshold is not None:
            bounds = [box(image, self.threshold) for image in self.mask]
            self.vertical = [resampler(*scaled(top, bottom, above, h), h, h) for top, bottom, _, _ in bounds]
            self.horizontal = [resampler(*scaled(a, b, left, w), w, w) for _, _, a, b in bounds]
        if self.partition == "resize":
            high, wide = -(-h // self.k) * self.k, -(-w // self.k) * self.k
            self.vertical = [resampler(0, h, h, high) @ crop for crop in self.vertical]
            self.horizontal = [resampler(0, w, w, wide) @ crop for crop in self.horizontal]
        rows = []
        for i in range(n):
            image = self.vertical[i] @ (self.weight[i] * self.features[i]) @ self.horizontal[i].T
            self.high, self.wide = image.shape[1] // self.k, image.shape[2] // self.k
            for a, b in product(range(self.k), repeat=2):
                rows.append(image[:, self._span(a, self.high), self._span(b, self.wide)].ravel())
        rows = np.stack(rows)
        # Scaled by the largest entry, so that the squares of very large and very small patches stay in range.
        largest = np.abs(rows).max(1, keepdims=True)
        scaled_rows = rows / np.where(largest > 0, largest, 1)
        self.norms = largest[:, 0] * np.sqrt((scaled_rows**2).sum(1))
        self.alive = ~(self.norms <= self.eps)
        self.unit = np.zeros_like(rows)
        self.unit[self.alive] = rows[self.alive] / self.norms[self.alive, None]

    @staticmethod
    def _span(index: int, length: int) -> slice:
        return slice(index * length, (index + 1) * length)

    def gradient(self, of_unit: np.ndarray) -> np.ndarray:
        """Return the gradient to the features, given the gradient to the unit rows."""
        of_rows = np.zeros_like(of_unit)
        unit, rest = self.unit[self.alive], of_unit[self.alive]
        of_rows[self.alive] = (rest - unit * (unit * rest).sum(1, keepdims=True)) / self.norms[self.alive, None]
        result = np.empty_like(self.features)
        patch = iter(of_rows)
        for i in range(len(self.features)):
            image = np.empty((self.features.shape[1], self.high * self.k, self.wide * self.k))
            for a, b in product(range(self.k), repeat=2):
                cell = image[:, self._span(a, self.high), self._span(b, self.wide)]
                cell[...] = next(patch).reshape(cell.shape)
            result[i] = self.weight[i] * (self.vertical[i].T @ image @ self.horizontal[i])
        return result


def relations(student: np.ndarray, teacher: np.ndarray, positions: int) -> tuple[float, float, float]:
    """Return Eqs. 4, 5 and 6 of one stage, pair by pair."""
    images = len(student) // positions
    intra = inter_same = inter_diff = 0.0
    for (i, p), (j, q) in product(product(range(images), range(positions)), repeat=2):
        r, s = i * positions + p, j * positions + q
        squared = (teacher[r] @ teacher[s] - student[r] @ student[s]) ** 2
        if i == j:
            intra += squared
        if p == q:
            inter_same += squared
        if i != j and p != q:
            inter_diff += squared
    return intra, inter_same, inter_diff


def factors(weights, reduction: str, images: int, positions: int) -> list[float]:
    """Return the factors of Eqs. 4, 5 and 6."""
    pairs = [
        images * positions**2,
        positions * images**2,
        images * (images - 1) * positions * (positions - 1),
    ]
    if reduction == "batchmean":
        return [w / images**2 for w in weights]
    return [w / count if reduction == "mean" and count else w for w, count in zip(weights, pairs, strict=True)]


def local_correlation_loss(
    student,
    teacher,
    k,
    *,
    weights=(1, 1, 1),
    mask=None,
    threshold=None,
    partition="exact",
    reduction="batchmean",
    eps=1e-8,
) -> tuple[Tensor, list[Tensor]]:
    """Return Eq. 7 in float64: the loss, and its gradients to the student's maps of every stage, then to
    the teacher's.
    """
    students, teachers, masks = ([array(x) for x in stages(value)] for value in (student, teacher, mask))
    ks = [k] * len(students) if isinstance(k, int) else k
    loss, of_students, of_teachers = 0.0, [], []
    for student, teacher, k, mask in zip(students, teachers, ks, masks or [None] * len(students), strict=True):
        if mask is not None:
            mask = mask.reshape(len(mask), *mask.shape[-2:])
        student, teacher = (Patches(features, k, mask, threshold, partition, eps) for features in (student, teacher))
        images, positions = len(student.features), k * k
        factor = factors(weights, reduction, images, positions)
        loss += float(np.dot(factor, relations(student.unit, teacher.unit, positions)))
        of_student, of_teacher = unit_gradients(student.unit, teacher.unit, positions, factor)
        of_students.append(student.gradient(of_student))
        of_teachers.append(teacher.gradient(of_teacher))
    return torch.tensor(loss, dtype=torch.float64), [torch.from_numpy(g) for g in (*of_students, *of_teachers)]


def stages(value) -> list[Tensor]:
    """Return the stages of an argument that is one tensor, a sequence of tensors, or None."""
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit_gradients(student: np.ndarray, teacher: np.ndarray, positions: int, factor) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of one stage to both networks' unit rows: 4 (W ∘ D) X and -4 (W ∘ D) Y."""
    image, position = np.divmod(np.arange(len(student)), positions)
    same_image, same_position = image[:, None] == image, position[:, None] == position
    pair = factor[0] * same_image + factor[1] * same_position + factor[2] * ~(same_image | same_position)
    weighted = 4 * pair * (student @ student.T - teacher @ teacher.T)
    return weighted @ student, -weighted @ teacher


def eager(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Return the paper's loss of one stage, divided by n² (Eq. 2), as one writes it in PyTorch, in the precision of its
    inputs.
    """

    def cosines(maps: Tensor) -> Tensor:
        size = (maps.shape[2] // k, maps.shape[3] // k)
        cells = torch.nn.functional.unfold(maps, size, stride=size)  # n x d x k²
        rows = torch.nn.functional.normalize(cells.transpose(1, 2).flatten(0, 1), dim=1)
        return rows @ rows.T

    squares = (cosines(student) - cosines(teacher)).square()
    return (squares.sum() + squares.diagonal().sum()) / len(student) ** 2
