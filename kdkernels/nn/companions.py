"""Losses that the methods train beside their own, or compare with, as modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from .. import checks, functional
from ..functional import companions
from ..ops import kd, rkd, similarity_preserving
from ..ops.row_masks import zeroed
from ..types import Backend, DivergenceName, FormName, Group, Reduction, RowReduction
from .base import SettingsModule

__all__ = [
    "AttentionTransferLoss",
    "ChannelWiseLoss",
    "HintLoss",
    "KDLoss",
    "LogitMSELoss",
    "ProbabilisticTransferLoss",
    "RelationalKDLoss",
    "SimilarityPreservingLoss",
    "TeacherFreeKDLoss",
]


@dataclass(eq=False, repr=False)
class KDLoss(SettingsModule):
    """Hold the settings of ``kdkernels.kd_loss`` (LKD Eq. 1).

    Call it with the logits of student and teacher, b x K or of any other shape. It returns a scalar, or one number per
    row with ``reduction="none"``. The tensors of a batch are keywords of the call: ``mask``, ``labels``,
    ``teacher_indices``, and a ``temperature`` that learns, which replaces the module's own.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import KDLoss
        >>> KDLoss(temperature=4.0)(torch.randn(64, 100), torch.randn(64, 100)).shape
        torch.Size([])
    """

    temperature: float = 4.0
    _: KW_ONLY
    scale: bool = True
    dim: int = -1
    ignore_index: int = -100
    reduction: RowReduction = "batchmean"
    divergence: DivergenceName = "forward"
    beta: float = 0.5
    standardize: bool = False
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        kd.check_settings(self.temperature, self.reduction, self.divergence, self.beta)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **of_batch: Tensor | None) -> Tensor:
        return functional.kd_loss(student_logits, teacher_logits, **(self.settings | of_batch))


@dataclass(eq=False, repr=False)
class TeacherFreeKDLoss(SettingsModule):
    """Hold the settings of ``kdkernels.teacher_free_kd_loss``: self-training by an earlier copy of the student.

    Call it with the b x K logits of student and copy, and b labels. It returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import TeacherFreeKDLoss
        >>> loss = TeacherFreeKDLoss(alpha=0.9)
        >>> loss(torch.randn(64, 100), torch.randn(64, 100), torch.randint(100, (64,))).shape
        torch.Size([])
    """

    alpha: float = 0.9
    temperature: float = 4.0
    _: KW_ONLY
    scale: bool = True
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        companions.check_teacher_free(self.alpha, self.temperature)

    def forward(self, student_logits: Tensor, own_logits: Tensor, labels: Tensor) -> Tensor:
        return functional.teacher_free_kd_loss(student_logits, own_logits, labels, **self.settings)


@dataclass(eq=False, repr=False)
class LogitMSELoss(SettingsModule):
    """Call ``kdkernels.logit_mse_loss``, logit transfer.

    Call it with the b x K logits of student and teacher, and a mask of the samples that count if some do not. It
    returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import LogitMSELoss
        >>> LogitMSELoss()(torch.randn(64, 100), torch.randn(64, 100)).shape
        torch.Size([])
    """

    _: KW_ONLY
    backend: Backend = "auto"

    def check(self) -> None:
        companions.LOGIT_MSE.check_backend(self.backend)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.logit_mse_loss(student_logits, teacher_logits, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class AttentionTransferLoss(SettingsModule):
    """Hold the settings of ``kdkernels.attention_transfer_loss``, AT.

    Call it with n x c x h x w features of student and teacher, or with sequences of them, and a mask of the samples
    that count if some do not. It returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import AttentionTransferLoss
        >>> AttentionTransferLoss()(torch.randn(8, 16, 8, 8), torch.randn(8, 64, 4, 4)).shape
        torch.Size([])
    """

    _: KW_ONLY
    reduction: Reduction = "mean"
    eps: float = 1e-12
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        companions.check_attention_transfer(**self.settings)

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        return functional.attention_transfer_loss(student, teacher, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class SimilarityPreservingLoss(SettingsModule):
    """Hold the settings of ``kdkernels.similarity_preserving_loss``, SP.

    Call it with n x ... features of student and teacher, and a mask of the samples that count if some do not. It
    returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import SimilarityPreservingLoss
        >>> SimilarityPreservingLoss()(torch.randn(32, 16, 8, 8), torch.randn(32, 64, 4, 4)).shape
        torch.Size([])
    """

    _: KW_ONLY
    reduction: Reduction = "mean"
    form: FormName = "auto"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        similarity_preserving.check_settings(self.reduction, self.form)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.similarity_preserving_loss(student, teacher, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class HintLoss(SettingsModule):
    """Compare the student's features, after a 1 x 1 convolution, with the teacher's: FitNet's hint.

    It calls ``kdkernels.hint_loss``. The convolution is trained with the student, so give its parameters to the
    optimizer. Call it with b x c x h x w features of student and teacher, and a mask of the samples that count if some
    do not. It returns a scalar.

    Args:
        student_channels: the channels of the student's features.
        teacher_channels: the channels of the teacher's features.
        backend: "auto", "reference", "native", "triton" or "library"; see ``kdkernels.use_backend``.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import HintLoss
        >>> hint = HintLoss(student_channels=16, teacher_channels=64)
        >>> hint(torch.randn(8, 16, 8, 8), torch.randn(8, 64, 8, 8)).shape
        torch.Size([])
    """

    student_channels: int
    teacher_channels: int
    _: KW_ONLY
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regressor = nn.Conv2d(self.student_channels, self.teacher_channels, kernel_size=1)

    def check(self) -> None:
        super().check()
        checks.positive_int("student_channels", self.student_channels)
        checks.positive_int("teacher_channels", self.teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:  # before the convolution, whose weights would have a NaN of the padding in their gradient
            checks.sample_mask(mask, "student", checks.tensor("student", student, 4, "b x c x h x w"))
            (student,) = zeroed(mask, (student,))
        return functional.hint_loss(self.regressor(student), teacher, mask=mask, backend=self.backend)


@dataclass(eq=False, repr=False)
class ChannelWiseLoss(SettingsModule):
    """Hold the settings of ``kdkernels.channel_wise_loss``, CWD.

    Call it with b x c x h x w maps of student and teacher, and a mask of the samples that count if some do not. It
    returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ChannelWiseLoss
        >>> ChannelWiseLoss(temperature=4.0)(torch.randn(2, 19, 8, 8), torch.randn(2, 19, 8, 8)).shape
        torch.Size([])
    """

    temperature: float = 4.0
    _: KW_ONLY
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        kd.check_settings(self.temperature)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.channel_wise_loss(student, teacher, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class RelationalKDLoss(SettingsModule):
    """Hold the settings of ``kdkernels.relational_kd_loss``, RKD.

    Call it with b x d embeddings of student and teacher, and a mask of the samples that count if some do not. It
    returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import RelationalKDLoss
        >>> RelationalKDLoss()(torch.randn(32, 64), torch.randn(32, 128)).shape
        torch.Size([])
    """

    _: KW_ONLY
    distance_weight: float = 25.0
    angle_weight: float = 50.0
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        rkd.RKD.check_backend(self.backend)
        rkd.check_settings(self.distance_weight, self.angle_weight)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.relational_kd_loss(student, teacher, mask=mask, **self.settings)


@dataclass(eq=False, repr=False)
class ProbabilisticTransferLoss(SettingsModule):
    """Hold the settings of ``kdkernels.probabilistic_transfer_loss``, PKT.

    Call it with b x d embeddings of student and teacher, and a mask of the samples that count if some do not. It
    returns a scalar.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ProbabilisticTransferLoss
        >>> ProbabilisticTransferLoss()(torch.randn(32, 64), torch.randn(32, 128)).shape
        torch.Size([])
    """

    _: KW_ONLY
    eps: float = 1e-8
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        companions.check_probabilistic_transfer(self.eps, self.backend)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.probabilistic_transfer_loss(student, teacher, mask=mask, **self.settings)
