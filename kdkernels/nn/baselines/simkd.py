"""Distillation with the teacher's classifier reused (SimKD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from ... import checks
from ...ops.feature_mse.reference import smaller_size
from ..base import SettingsModule
from ..semckd import averaged
from . import shapes

__all__ = ["SimKDProjector"]


@dataclass(eq=False, repr=False)
class SimKDProjector(SettingsModule):
    """Project the student's last map, so that the teacher's classifier can read it, SimKD (Chen et al. 2022).

    The projector is 1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 - BN - ReLU convolutions without biases. The hidden layers
    have c_T / r channels. The student's only loss is ``‖f_T − P(f_S)‖²``, the mean over all numbers, which is
    ``kdkernels.hint_loss``. There is no loss of labels or logits. The teacher's classifier, frozen, gives the logits of
    the pooled projected map. So the deployed network is student, projector and the teacher's classifier.

    Train the module with the student: give its parameters to the optimizer.

    Args:
        student_channels: the channels of the student's last feature map.
        teacher_channels: c_T, the channels of the teacher's last feature map.
        factor: r, by which the hidden layers are narrower.

    Examples:
        >>> import torch
        >>> from kdkernels import hint_loss
        >>> from kdkernels.nn import SimKDProjector
        >>> projector, classifier = SimKDProjector(64, 256), torch.nn.Linear(256, 100)
        >>> student, teacher = torch.randn(8, 64, 8, 8, requires_grad=True), torch.randn(8, 256, 8, 8)
        >>> projected = projector(student, teacher.shape[2:])
        >>> hint_loss(projected, teacher).backward()
        >>> logits = projector.logits(projected, classifier)
        >>> logits.shape
        torch.Size([8, 100])
    """

    student_channels: int
    teacher_channels: int
    _: KW_ONLY
    factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.teacher_channels // self.factor
        self.layers = nn.Sequential(
            *_convolution(self.student_channels, hidden, 1),
            *_convolution(hidden, hidden, 3),
            *_convolution(hidden, self.teacher_channels, 1),
        )

    def check(self) -> None:
        super().check()
        checks.positive_int("student_channels", self.student_channels)
        checks.positive_int("teacher_channels", self.teacher_channels)
        if checks.positive_int("factor", self.factor) > self.teacher_channels:
            raise ValueError(f"factor must be at most teacher_channels={self.teacher_channels}, got {self.factor!r}")

    def forward(self, student: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return the projected map, b x c_T x h x w.

        Args:
            student: b x c_S x h x w features.
            size: height and width of the teacher's map. A larger student's map is first averaged down to it. None
                leaves the size as it is.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        student = shapes.maps("student", student, self.student_channels)
        if size is not None:
            height, width = size
            student = averaged(student, smaller_size(student, student.new_empty(1, 1, height, width)))
        projected: Tensor = self.layers(shapes.as_parameters(student, self.layers))
        return projected

    @staticmethod
    def logits(projected: Tensor, classifier: nn.Module) -> Tensor:
        """Return the teacher's classifier of the projected map, b x K.

        Args:
            projected: b x c_T x h x w, what the module returns.
            classifier: the teacher's last layer. Freeze it by ``requires_grad_(False)``.
        """
        logits: Tensor = classifier(projected.mean((2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, side: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
