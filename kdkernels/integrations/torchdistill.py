"""torchdistill's losses on fused kernels, under their own names. Add one line to a configuration:

    dependencies: ['kdkernels.integrations.torchdistill']

``KDLoss``, ``ATLoss``, ``PKTLoss``, ``RKDLoss``, ``CCKDLoss`` and ``SPKDLoss`` of its registry are then these classes.
They take torchdistill's arguments and return its number and gradient. Where torchdistill departs from the paper,
``paper=True`` follows the paper. ``LocalCorrelationLoss``, ``CorrelationCongruenceLoss`` and
``InterClassCorrelationLoss`` are new. They take the arguments of ``kdkernels.nn`` and two paths.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from .. import functional
from .. import nn as losses
from ..types import RowReduction
from .repdistiller import PKT, attention_error

__all__ = [
    "ATLoss",
    "CCKDLoss",
    "CorrelationCongruenceLoss",
    "InterClassCorrelationLoss",
    "KDLoss",
    "LocalCorrelationLoss",
    "PKTLoss",
    "RKDLoss",
    "SPKDLoss",
]

IO = Mapping[str, Mapping[str, Any]]


@register_mid_level_loss
class KDLoss(nn.Module):
    """torchdistill's KDLoss: ``α·cross_entropy + β·T²·KL``; without α or targets, it is only the KL, without T²."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum", "none"):
            raise ValueError(f"reduction must be 'batchmean', 'mean', 'sum' or 'none', got {reduction!r}")
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - (alpha or 0) if beta is None else beta
        self.reduction = cast(RowReduction, reduction)
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean" if reduction == "batchmean" else reduction, **kwargs)

    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, targets: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        student, teacher = _read(student_io_dict, self.student), _read(teacher_io_dict, self.teacher)
        soft = self.divergence(student, teacher)
        if not self.alpha or targets is None:
            return soft
        hard: Tensor = self.alpha * self.cross_entropy(student, targets)
        return hard + self.beta * (self.temperature * self.temperature) * soft

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the KL of softened logits, b x K, or b x K x ... for pixels or tokens, with torchdistill's
        reduction.
        """
        if self.reduction == "none":  # every entry separately, which no fused loss keeps
            s, t = (logits / self.temperature for logits in (student, teacher))
            return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none")
        loss = functools.partial(functional.kd_loss, temperature=self.temperature, scale=False, dim=1)
        if self.reduction == "mean":  # over rows and classes
            return loss(student, teacher, reduction="mean") / student.shape[1]
        return loss(student, teacher, reduction=self.reduction)


@register_mid_level_loss
class ATLoss(nn.Module):
    """torchdistill's ATLoss in its mode 'code'; 'paper' takes the unsquared distance of Eq. 2, divided by the batch."""

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **_: Any) -> None:
        super().__init__()
        if mode not in ("code", "paper"):
            raise ValueError(f"mode must be 'code' or 'paper', got {mode!r}")
        self.at_pairs = at_pairs
        self.mode = mode

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *_: Any, **__: Any) -> Tensor:
        compare = attention_error if self.mode == "code" else _attention_distance
        terms = []
        for pair in self.at_pairs.values():
            student, teacher = (
                _read(io, (pair[role]["path"], pair[role]["io"]))
                for io, role in ((student_io_dict, "student"), (teacher_io_dict, "teacher"))
            )
            terms.append(pair.get("weight", 1) * compare(student, teacher))
        return torch.stack(terms).sum()


def _attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(f.square().sum(1).flatten(1)) for f in (student, teacher))
    distances: Tensor = torch.linalg.vector_norm(s - t, dim=1)
    return distances.mean()


@register_mid_level_loss
class PKTLoss(nn.Module):
    """torchdistill's PKTLoss."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        self.student = student_module_path, student_module_io
        self.teacher = teacher_module_path, teacher_module_io
        self.eps = eps

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *_: Any, **__: Any) -> Tensor:
        student, teacher = _read(student_io_dict, self.student), _read(teacher_io_dict, self.teacher)
        return PKT.cosine_similarity_loss(student, teacher, self.eps)


class _OutputLoss(nn.Module):
    """A loss of the outputs of one module of each network."""

    def __init__(self, student: str, teacher: str) -> None:
        super().__init__()
        self.student = student, "output"
        self.teacher = teacher, "output"

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *_: Any, **__: Any) -> Tensor:
        return self.compare(_read(student_io_dict, self.student), _read(teacher_io_dict, self.teacher))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


@register_mid_level_loss
class RKDLoss(_OutputLoss):
    """torchdistill's RKDLoss."""

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float,
        angle_factor: float,
        reduction: str,
        **_: Any,
    ) -> None:
        super().__init__(student_output_path, teacher_output_path)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.factors = dist_factor or 0.0, angle_factor or 0.0
        self.reduction = reduction

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        batch = len(student)
        pairs, triples = (batch**2, batch**3) if self.reduction == "sum" else (1, 1)
        distance, angle = self.factors
        return functional.relational_kd_loss(
            student.flatten(1),
            teacher.detach().flatten(1),
            distance_weight=distance * pairs,
            angle_weight=angle * triples,
        )


@register_mid_level_loss
class CCKDLoss(_OutputLoss):
    """torchdistill's CCKDLoss: the Frobenius norm of the difference over b², for rows without normalisation.

    ``paper=True`` is Eq. 6: the squared norm over b², for normalised rows. torchdistill's configurations write
    ``kernel_params`` with a ``key``, and its class ``kernel_config`` with a ``type``. Both work.
    """

    def __init__(
        self,
        student_linear_path: str,
        teacher_linear_path: str,
        kernel_config: Mapping[str, Any] | None = None,
        reduction: str = "batchmean",
        paper: bool = False,
        kernel_params: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        super().__init__(student_linear_path, teacher_linear_path)
        config = kernel_config or kernel_params or {}
        kind = config.get("type", config.get("key"))
        kernels = {"gaussian": "taylor_rbf", "bilinear": "bilinear"}
        if kind not in kernels:
            raise ValueError(f"kernel_config['type'] must be one of {tuple(kernels)}, got {kind!r}")
        self.kernel: dict[str, Any] = {"kernel": kernels[kind]}
        if kind == "gaussian":
            self.kernel |= {"gamma": config["gamma"], "order": config["max_p"]}
        self.reduction = reduction
        self.paper = paper

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        squares = functional.correlation_congruence_loss(
            student, teacher, normalize=self.paper, reduction="sum", **self.kernel
        )
        loss = squares if self.paper else _root(squares)
        return loss / len(student) ** 2 if self.reduction == "batchmean" else loss


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, squares, 1.0).sqrt() * positive


@register_mid_level_loss
class SPKDLoss(_OutputLoss):
    """torchdistill's SPKDLoss, which divides the rows of the Gram matrices by their L1 norm.

    ``paper=True`` divides by the L2 norm, as SP's authors do. Only this version is fused.
    """

    def __init__(
        self, student_output_path: str, teacher_output_path: str, reduction: str, paper: bool = False, **_: Any
    ) -> None:
        super().__init__(student_output_path, teacher_output_path)
        self.reduction = reduction
        self.paper = paper

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.paper:
            mean = functional.similarity_preserving_loss(student, teacher)
        else:
            s, t = (F.normalize(x @ x.mT, p=1) for x in (student.flatten(1), teacher.flatten(1)))
            mean = (s - t).square().sum() / len(student) ** 2
        return mean if self.reduction == "batchmean" else mean * len(student) ** 2


class _OwnLoss(_OutputLoss):
    """A module of kdkernels on two modules' outputs. Its settings are passed on."""

    module: type[nn.Module]

    def __init__(self, student_module_path: str, teacher_module_path: str, **settings: Any) -> None:
        super().__init__(student_module_path, teacher_module_path)
        self.loss = self.module(**settings)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss: Tensor = self.loss(student, teacher)
        return loss


@register_mid_level_loss
class LocalCorrelationLoss(_OwnLoss):
    """LKD on feature maps: ``kdkernels.nn.LocalCorrelationLoss``."""

    module = losses.LocalCorrelationLoss


@register_mid_level_loss
class CorrelationCongruenceLoss(_OwnLoss):
    """CCKD as in its paper, on embeddings: ``kdkernels.nn.CorrelationCongruenceLoss``."""

    module = losses.CorrelationCongruenceLoss


@register_mid_level_loss
class InterClassCorrelationLoss(_OwnLoss):
    """ICCT on logits: ``kdkernels.nn.InterClassCorrelationLoss``."""

    module = losses.InterClassCorrelationLoss


def _read(io_dict: IO, place: tuple[str, str]) -> Any:
    path, kind = place
    return io_dict[path][kind]
