"""mdistiller's distiller classes on fused kernels: the same configuration, numbers and gradients.

After ``from mdistiller.distillers import distiller_dict`` in its ``tools/train.py``, add one line:

    from kdkernels.integrations.mdistiller import distillers; distiller_dict.update(distillers)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from . import repdistiller

__all__ = ["AT", "DKD", "KD", "PKT", "RKD", "SP", "distillers"]

Features = dict[str, Any]


class Distiller(nn.Module):
    """The interface that mdistiller's trainer calls: a student that is trained, and a fixed teacher."""

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
        logits: Tensor = self.student(image)[0]
        return logits

    def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features = self.student(image)
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(image)
        hard = self.ce_loss_weight * F.cross_entropy(logits, target)
        soft = self.distillation((logits, features), (teacher_logits, teacher_features))
        return logits, {"loss_ce": hard, "loss_kd": soft}

    def distillation(self, student: tuple[Tensor, Features], teacher: tuple[Tensor, Features]) -> Tensor:
        """Return the weighted loss from logits and features of both networks."""
        raise NotImplementedError


class KD(Distiller):
    """Softened KL divergence: ``kdkernels.kd_loss``.

    It also reads EXPERIMENT.LOGIT_STAND of the fork for logit standardisation.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        experiment = getattr(cfg, "EXPERIMENT", None)
        self.logit_stand = bool(getattr(experiment, "LOGIT_STAND", False))

    def distillation(self, student: tuple[Tensor, Features], teacher: tuple[Tensor, Features]) -> Tensor:
        # The mean over images, and over their pixels for segmentation.
        loss = functools.partial(functional.kd_loss, temperature=self.settings.TEMPERATURE, dim=1, reduction="mean")
        weighted: Tensor = self.settings.LOSS.KD_WEIGHT * loss(student[0], teacher[0], standardize=self.logit_stand)
        return weighted


class DKD(Distiller):
    """Decoupled distillation: ``kdkernels.dkd_loss``, whose weight grows in the first WARMUP epochs.

    It also reads EXPERIMENT.LOGIT_STAND of the fork for logit standardisation, which divides each row of logits, minus
    its mean, by its standard deviation.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        nn.Module.__init__(self)
        self.student = student
        self.teacher = teacher
        self.settings = cfg["DKD"]
        self.ce_loss_weight = self.settings.CE_WEIGHT
        experiment = getattr(cfg, "EXPERIMENT", None)
        self.logit_stand = bool(getattr(experiment, "LOGIT_STAND", False))

    def forward_train(self, image: Tensor, target: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student(image)
        with torch.no_grad():
            teacher_logits, _ = self.teacher(image)
        hard = self.ce_loss_weight * F.cross_entropy(logits, target)
        pair = (logits, teacher_logits)
        student, teacher = map(standardised, pair) if self.logit_stand else pair
        soft = functional.dkd_loss(
            student,
            teacher,
            target.reshape(-1),
            alpha=self.settings.ALPHA,
            beta=self.settings.BETA,
            temperature=self.settings.T,
        )
        return logits, {"loss_ce": hard, "loss_kd": min(given["epoch"] / self.settings.WARMUP, 1.0) * soft}


def standardised(logits: Tensor) -> Tensor:
    """Return each row minus its mean, divided by its standard deviation, as the fork of logit standardisation does."""
    mean, deviation = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True)
    return (logits - mean) / (1e-7 + deviation)


class FeatureDistiller(Distiller):
    """A distiller whose loss compares features and is weighted by FEAT_WEIGHT."""

    def distillation(self, student: tuple[Tensor, Features], teacher: tuple[Tensor, Features]) -> Tensor:
        weighted: Tensor = self.settings.LOSS.FEAT_WEIGHT * self.compare(student[1], teacher[1])
        return weighted

    def compare(self, student: Features, teacher: Features) -> Tensor:
        raise NotImplementedError


class AT(FeatureDistiller):
    """Attention transfer over all stages except the first."""

    def compare(self, student: Features, teacher: Features) -> Tensor:
        stages: list[Tensor] = repdistiller.Attention(self.settings.P)(student["feats"][1:], teacher["feats"][1:])
        first, *others = stages
        return sum(others, first)


class SP(FeatureDistiller):
    """Similarity preserving on the last stage: ``kdkernels.similarity_preserving_loss``."""

    def compare(self, student: Features, teacher: Features) -> Tensor:
        return repdistiller.Similarity().similarity_loss(student["feats"][-1], teacher["feats"][-1])


class RKD(FeatureDistiller):
    """Relational distillation of the pooled features: ``kdkernels.relational_kd_loss``.

    Only the defaults of PDIST are supported: distances without a square, and an eps of 1e-12.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        if self.settings.PDIST.SQUARED:
            raise ValueError("RKD.PDIST.SQUARED must be False, got True")

    def compare(self, student: Features, teacher: Features) -> Tensor:
        return functional.relational_kd_loss(
            student["pooled_feat"].flatten(1),
            teacher["pooled_feat"].flatten(1),
            distance_weight=self.settings.DISTANCE_WEIGHT,
            angle_weight=self.settings.ANGLE_WEIGHT,
        )


class PKT(FeatureDistiller):
    """Probabilistic transfer of the pooled features."""

    def compare(self, student: Features, teacher: Features) -> Tensor:
        return repdistiller.PKT.cosine_similarity_loss(student["pooled_feat"], teacher["pooled_feat"])


distillers = {distiller.__name__: distiller for distiller in (KD, DKD, AT, SP, RKD, PKT)}
