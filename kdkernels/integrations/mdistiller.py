"""mdistiller's distiller classes on fused kernels: the same configuration, numbers and gradients.

After ``from mdistiller.distillers import distiller_dict`` in its ``tools/train.py``, add one line:

    from kdkernels.integrations.mdistiller import distillers; distiller_dict.update(distillers)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from . import repdistiller

__all__ = ["AT", "KD", "PKT", "RKD", "SP", "distillers"]

Features = dict[str, Any]


class Distiller(nn.Module):
    """The interface that mdistiller's trainer calls: a student that learns and a teacher that stays as it is."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.settings = cfg[type(self).__name__]
        self.ce_loss_weight = self.settings.LOSS.CE_WEIGHT

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        return 0

    def forward(self, **kwargs: Any) -> Any:
        return self.forward_train(**kwargs) if self.training else self.forward_test(kwargs["image"])

    def forward_test(self, image: Tensor) -> Tensor:
        return self.student(image)[0]

    def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features = self.student(image)
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(image)
        hard = self.ce_loss_weight * F.cross_entropy(logits, target)
        soft = self.distillation((logits, features), (teacher_logits, teacher_features))
        return logits, {"loss_ce": hard, "loss_kd": soft}

    def distillation(self, student: tuple[Tensor, Features], teacher: tuple[Tensor, Features]) -> Tensor:
        """The weighted loss from logits and features of both networks."""
        raise NotImplementedError


class KD(Distiller):
    """Softened KL divergence: ``kdkernels.kd_loss``."""

    def distillation(self, student, teacher):
        loss = functional.kd_loss(student[0], teacher[0], temperature=self.settings.TEMPERATURE)
        return self.settings.LOSS.KD_WEIGHT * loss


class FeatureDistiller(Distiller):
    """A distiller whose loss compares features and is weighted by FEAT_WEIGHT."""

    def distillation(self, student, teacher):
        return self.settings.LOSS.FEAT_WEIGHT * self.compare(student[1], teacher[1])

    def compare(self, student: Features, teacher: Features) -> Tensor:
        raise NotImplementedError


class AT(FeatureDistiller):
    """Attention transfer over all stages but the first."""

    def compare(self, student, teacher):
        return sum(repdistiller.Attention(self.settings.P)(student["feats"][1:], teacher["feats"][1:]))


class SP(FeatureDistiller):
    """Similarity preserving on the last stage: ``kdkernels.similarity_preserving_loss``."""

    def compare(self, student, teacher):
        return repdistiller.Similarity().similarity_loss(student["feats"][-1], teacher["feats"][-1])


class RKD(FeatureDistiller):
    """Relational distillation of the pooled features: ``kdkernels.relational_kd_loss``.

    The defaults of PDIST, distances that are not squared and an eps of 1e-12, are the only ones.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        if self.settings.PDIST.SQUARED:
            raise ValueError("RKD.PDIST.SQUARED must be False, got True")

    def compare(self, student, teacher):
        return functional.relational_kd_loss(
            student["pooled_feat"].flatten(1),
            teacher["pooled_feat"].flatten(1),
            distance_weight=self.settings.DISTANCE_WEIGHT,
            angle_weight=self.settings.ANGLE_WEIGHT,
        )


class PKT(FeatureDistiller):
    """Probabilistic transfer of the pooled features."""

    def compare(self, student, teacher):
        return repdistiller.PKT.cosine_similarity_loss(student["pooled_feat"], teacher["pooled_feat"])


distillers = {distiller.__name__: distiller for distiller in (KD, AT, SP, RKD, PKT)}
