"""Knowledge review (ReviewKD): deep layers of the student learn first, and shallow layers with what they found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks, functional
from ...types import Backend
from ..base import SettingsModule
from . import shapes

__all__ = ["ReviewKDLoss"]

_LEVELS = (4, 2, 1)  # sides to which the loss averages the maps


@dataclass(eq=False, repr=False)
class ReviewKDLoss(SettingsModule):
    """Fuse each student layer with the deeper layers, and compare it with the teacher's, ReviewKD (Chen et al. 2021).

    From the deepest layer to the shallowest, the attention based fusion (ABF) reduces the student's map to m channels
    by a 1x1 convolution and BN. Below the deepest layer, it enlarges the fused map of the deeper layer to the same
    size, and adds both maps by two attention maps: the sigmoid of a 1x1 convolution of both. The sum, in the teacher's
    size, is what the shallower layer receives. A 3x3 convolution and BN give it the teacher's channels.

    The loss is the sum over layers of the hierarchical context loss (HCL): the mean squared error of the maps plus ½, ¼
    and ⅛ times the mean squared error of the maps averaged to 4 x 4, 2 x 2 and 1 x 1, divided by the sum of these
    weights. Sides that are not smaller than height and width of the map are left out. In the paper, the weight of the
    loss grows linearly over the first 20 epochs.

    Train the module with the student: give its parameters to the optimizer.

    Args:
        student_channels: the channels of each student layer, the shallowest first. The authors' program also passes the
            pooled embedding as the deepest layer, b x c x 1 x 1.
        teacher_channels: the channels of each teacher layer. Layer i of the student learns from layer i of the teacher.
        hidden_channels: m. None is the channels of the student's deepest layer, at most 512.
        backend: what computes the squared errors: "auto", "reference", "native", "triton" or "library".

    Examples:
        >>> import torch
        >>> from kdkernels.nn import ReviewKDLoss
        >>> review = ReviewKDLoss(student_channels=(8, 16), teacher_channels=(16, 32))
        >>> student = [torch.randn(4, 8, 8, 8, requires_grad=True), torch.randn(4, 16, 4, 4, requires_grad=True)]
        >>> teacher = [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
        >>> epoch = 5
        >>> loss = min(1, epoch / 20) * review(student, teacher)
        >>> loss.backward()
    """

    student_channels: Sequence[int]
    teacher_channels: Sequence[int]
    _: KW_ONLY
    hidden_channels: int | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = self.hidden_channels or min(512, self.student_channels[-1])
        pairs = list(zip(self.student_channels, self.teacher_channels, strict=True))
        self.fusions = nn.ModuleList(  # the deepest first
            _Fusion(student, hidden, teacher, deepest=index == 0)
            for index, (student, teacher) in enumerate(reversed(pairs))
        )

    def check(self) -> None:
        super().check()
        shapes.channels(self.student_channels, self.teacher_channels)
        if self.hidden_channels is not None:
            checks.positive_int("hidden_channels", self.hidden_channels)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: the b x c x h x w features of each student layer, the shallowest first.
            teacher: the features of each teacher layer. They receive a gradient only if they require one.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        students = shapes.maps_of_layers("student", student, self.student_channels)
        teachers = shapes.maps_of_layers("teacher", teacher, self.teacher_channels, students[0])
        losses, deeper = [], None
        for fuse, own, target in zip(self.fusions, reversed(students), reversed(teachers), strict=True):
            output, deeper = cast(_Fusion, fuse)(own, deeper, target.shape[2:])
            losses.append(_hierarchical(output, target, self.backend))
        return torch.stack(losses).sum()


class _Fusion(nn.Module):
    """Attention based fusion of a student's layer and the fused map of the deeper layer."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden))
        self.expand = nn.Sequential(nn.Conv2d(hidden, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * hidden, 2, 1), nn.Sigmoid())
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(cast(nn.Conv2d, convolution).weight, a=1)

    def forward(self, own: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what the teacher's layer is compared with, b x c_T x h' x w', and the fused map b x m x h' x w'."""
        fused: Tensor = self.reduce(shapes.as_parameters(own, self))
        if self.attention is not None and deeper is not None:
            deeper = _enlarged(deeper, fused.shape[2:])
            of_own, of_deeper = self.attention(torch.cat([fused, deeper], 1)).split(1, 1)  # b x 1 x h x w each
            fused = of_own * fused + of_deeper * deeper
        fused = _enlarged(fused, size)
        return self.expand(fused), fused


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[2:] == tuple(size) else F.interpolate(maps, tuple(size), mode="nearest")


def _hierarchical(student: Tensor, teacher: Tensor, backend: Backend) -> Tensor:
    """Return HCL of two maps of one size. ``hint_loss`` averages the teacher's map to the student's size."""
    loss = functional.hint_loss(student, teacher, backend=backend)
    weight = total = 1.0
    for side in _LEVELS:
        if side < min(student.shape[2:]):
            weight /= 2
            total += weight
            loss = loss + weight * functional.hint_loss(F.adaptive_avg_pool2d(student, side), teacher, backend=backend)
    return loss / total
