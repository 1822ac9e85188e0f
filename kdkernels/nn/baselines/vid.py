"""Variational information distillation (VID)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...ops.feature_mse.reference import smaller_size
from ...ops.shapes import accumulation_dtype
from ..base import SettingsModule
from ..semckd import averaged
from . import shapes

__all__ = ["VIDLoss"]


@dataclass(eq=False, repr=False)
class VIDLoss(SettingsModule):
    """Predict the teacher's features by a Gaussian around a function of the student's, VID (Ahn et al. 2019).

    The loss is the mean over samples, channels and positions of ``½ (t − μ(s))² / σ_c² + ½ log σ_c²``. This is the
    negative log-likelihood without the constant ½ log 2π. μ is 1x1 - ReLU - 1x1 - ReLU - 1x1 convolutions without
    biases, and ``σ_c² = softplus(α_c) + ε`` is learned for each channel of the teacher. The larger map is averaged down
    to the smaller. The paper sums over channels and positions. The mean is the authors' program, with weight 1.

    Make one module for each pair of layers, and add the losses. Train the module with the student: give its parameters
    to the optimizer.

    Args:
        student_channels: the channels of the student's features.
        teacher_channels: the channels of the teacher's features.
        hidden_channels: the channels between the convolutions. None is ``teacher_channels``.
        initial_variance: σ² at the start.
        eps: ε, the smallest variance.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import VIDLoss
        >>> vid = VIDLoss(student_channels=16, teacher_channels=64)
        >>> student, teacher = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 64, 8, 8)
        >>> vid(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([8, 16, 8, 8])
    """

    student_channels: int
    teacher_channels: int
    _: KW_ONLY
    hidden_channels: int | None = None
    initial_variance: float = 5.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.hidden_channels or self.teacher_channels
        self.mean = nn.Sequential(
            nn.Conv2d(self.student_channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, self.teacher_channels, 1, bias=False),
        )
        start = math.log(math.expm1(self.initial_variance - self.eps))  # the inverse of softplus
        self.scale = nn.Parameter(torch.full((self.teacher_channels,), start))

    def check(self) -> None:
        super().check()
        checks.positive_int("student_channels", self.student_channels)
        checks.positive_int("teacher_channels", self.teacher_channels)
        if self.hidden_channels is not None:
            checks.positive_int("hidden_channels", self.hidden_channels)
        eps = checks.positive("eps", self.eps)
        if checks.positive("initial_variance", self.initial_variance) <= eps:
            raise ValueError(f"initial_variance must be greater than eps={eps}, got {self.initial_variance!r}")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: b x c_S x h x w, float32, float64, bfloat16 or float16, any strides.
            teacher: b x c_T x h' x w'. They receive a gradient only if they require one.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        student = shapes.maps("student", student, self.student_channels)
        teacher = shapes.maps("teacher", teacher, self.teacher_channels)
        shapes.same_samples("teacher", teacher, "student", student)
        size = smaller_size(student, teacher)
        mean = self.mean(averaged(shapes.as_parameters(student, self.mean), size))
        with torch.autocast(student.device.type, enabled=False):
            dtype = accumulation_dtype(student, teacher)
            variance = F.softplus(self.scale.to(dtype)) + self.eps
            errors = (averaged(teacher, size).to(dtype) - mean.to(dtype)).square().mean((0, 2, 3))
            loss: Tensor = 0.5 * (errors / variance + variance.log()).mean()
            return loss
