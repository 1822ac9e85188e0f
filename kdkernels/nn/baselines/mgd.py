"""Matching guided distillation (MGD): an assignment of the teacher's channels to the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks, groups
from ...ops.feature_mse.reference import smaller_size
from ...ops.shapes import accumulation_dtype
from ...types import Group
from ..base import SettingsModule
from ..semckd import averaged
from . import shapes

__all__ = ["MGDLoss"]

Reducer = Literal["amp", "sm"]


@dataclass(eq=False, repr=False)
class MGDLoss(SettingsModule):
    """Compare the student's maps with the teacher's channels that match best, MGD (Yue et al. 2020).

    The cost of a student's channel and a teacher's channel is the mean over images of ``2 − 2 cos`` of their maps.
    ``track`` collects the costs of batches. ``assign`` then gives every student's channel the same number of the
    teacher's channels, each of them once, at the smallest total cost. Both are called before training, and every second
    epoch in the authors' program. Before the first assignment, channels are assigned in their order.

    The loss goes over layers i = 0, …, L − 1. It is ``1/b Σ_i 2^(i + 1 − L) Σ m (BN(s) − max(t, μ))²``. s is the
    student's map before ReLU, and t is what AMP or SM takes of the assigned channels of the teacher's map before ReLU.
    m is 1 where ``BN(s) > max(t, μ)`` or the target is positive, and 0 elsewhere. The margin μ of a channel is the mean
    of negative values of the teacher, from ``set_margins``. The authors' program divides the loss by 1e4 for images of
    side 224.

    Train the module with the student: give the parameters of its BNs to the optimizer.

    Args:
        student_channels: the channels of each student layer, the shallowest first.
        teacher_channels: the channels of each teacher layer, at least as many as the student's.
        reducer: "amp" takes the value with the largest magnitude among the assigned channels, and their mean margin.
            "sm" assigns one teacher's channel to each student's channel.
        group: the process group whose batches ``track`` collects together, "world", or None for one process.

    Memory:
        Each layer holds costs, c_S x c_T. A call takes two maps for each layer.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import MGDLoss
        >>> mgd = MGDLoss(student_channels=(8,), teacher_channels=(16,))
        >>> mgd.set_margins([torch.nn.BatchNorm2d(16)])  # the BN before the ReLU of the teacher's layer
        >>> student, teacher = torch.randn(4, 8, 8, 8, requires_grad=True), torch.randn(4, 16, 8, 8)
        >>> mgd.track([student], [teacher])  # for all batches of an epoch
        >>> mgd.assign()
        >>> mgd([student], [teacher]).backward()
        >>> student.grad.shape
        torch.Size([4, 8, 8, 8])
    """

    student_channels: Sequence[int]
    teacher_channels: Sequence[int]
    _: KW_ONLY
    reducer: Reducer = "amp"
    group: Group = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in self.student_channels)
        for index, (own, other) in enumerate(zip(self.student_channels, self.teacher_channels, strict=True)):
            count = own if self.reducer == "sm" else own * (other // own)
            self.register_buffer(f"assigned{index}", torch.arange(count))  # groups x c_S, teacher's channels
            self.register_buffer(f"margins{index}", torch.full((other,), -torch.inf))
            self.register_buffer(f"costs{index}", torch.zeros(own, other), persistent=False)
        self.images: Tensor
        self.register_buffer("images", torch.zeros((), dtype=torch.int64), persistent=False)

    def check(self) -> None:
        super().check()
        shapes.channels(self.student_channels, self.teacher_channels)
        for own, other in zip(self.student_channels, self.teacher_channels, strict=True):
            if own > other:
                raise ValueError(f"teacher_channels must be at least student_channels={own}, got {other}")
        checks.one_of("reducer", self.reducer, get_args(Reducer))

    def set_margins(self, norms: Sequence[nn.BatchNorm2d]) -> None:
        """Set the margins from the teacher's BN before the ReLU of each layer.

        BN makes values with mean β and deviation |γ|. The margin is the mean of their negative part, as if they were
        normal, or −3|γ| if fewer than one in a thousand is negative.

        Args:
            norms: for each layer, a module with ``weight`` and ``bias`` of the teacher's channels.
        """
        if len(norms) != len(self.teacher_channels):
            raise ValueError(f"norms must hold {len(self.teacher_channels)} layers, got {len(norms)}")
        for index, (norm, channels) in enumerate(zip(norms, self.teacher_channels, strict=True)):
            if norm.weight.shape != (channels,):
                raise ValueError(f"norms[{index}] must have {channels} channels, got {tuple(norm.weight.shape)}")
            self._buffer("margins", index).copy_(_margins(norm.weight.detach(), norm.bias.detach()))

    @torch.no_grad()
    def track(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Add the costs of a batch to what the next ``assign`` reads. It takes the arguments of the module's call."""
        students, teachers = self._checked(student, teacher)
        for index, (own, other) in enumerate(zip(students, teachers, strict=True)):
            size = smaller_size(own, other)
            own, other = (F.normalize(averaged(x, size).flatten(2).float(), dim=2) for x in (own, other))
            self._buffer("costs", index).add_((2 - 2 * own @ other.mT).sum(0))
        self.images += len(students[0])

    @torch.no_grad()
    def assign(self) -> None:
        """Assign the teacher's channels by the costs that were tracked, and forget the costs.

        Raises:
            RuntimeError: if nothing was tracked, or a cost is not finite.
        """
        group = groups.resolve(self.group)
        for index, own in enumerate(self.student_channels):
            costs = self._buffer("costs", index)
            if group is not None:
                torch.distributed.all_reduce(costs, group=group)
            if not self.images or not costs.isfinite().all():
                raise RuntimeError("assign needs finite costs: call track with batches of features first")
            copies = len(self._buffer("assigned", index)) // own
            self._buffer("assigned", index).copy_(assignment(costs.repeat(copies, 1)))
            costs.zero_()
        self.images.zero_()

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: the b x c_S x h x w features of each student layer before ReLU, the shallowest first.
            teacher: the b x c_T x h' x w' features of each teacher layer before ReLU. They receive no gradient. The
                larger map is averaged down to the smaller.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        students, teachers = self._checked(student, teacher)
        dtype = accumulation_dtype(*students, *teachers)
        losses = []
        for index, (own, other) in enumerate(zip(students, teachers, strict=True)):
            size = smaller_size(own, other)
            normal = self.norms[index](shapes.as_parameters(averaged(own, size), self.norms)).to(dtype)
            target = self._target(index, averaged(other.detach(), size).to(dtype))
            counted = (normal > target) | (target > 0)
            share = ((normal - target).square() * counted).sum() / len(own)  # NaN where nothing counts is NaN too
            losses.append(share / 2 ** (len(students) - index - 1))
        return torch.stack(losses).sum()

    def _target(self, index: int, maps: Tensor) -> Tensor:
        """Return what the student's channels are compared with, b x c_S x h x w."""
        b, _, h, w = maps.shape
        assigned, own = self._buffer("assigned", index), self.student_channels[index]
        grouped = maps[:, assigned].view(b, -1, own, h, w)
        margins = self._buffer("margins", index)[assigned].view(-1, own).mean(0).to(maps.dtype)
        largest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)).squeeze(1)
        return torch.maximum(largest, margins[:, None, None])

    def _checked(self, student: object, teacher: object) -> tuple[list[Tensor], list[Tensor]]:
        self.check()
        students = shapes.maps_of_layers("student", student, self.student_channels)
        return students, shapes.maps_of_layers("teacher", teacher, self.teacher_channels, students[0])

    def _buffer(self, name: str, index: int) -> Tensor:
        buffer: Tensor = getattr(self, f"{name}{index}")
        return buffer


def _margins(scale: Tensor, shift: Tensor) -> Tensor:
    deviation, mean = scale.double().abs().clamp(min=1e-12), shift.double()
    ratio = mean / deviation
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / (2 * torch.pi) ** 0.5
    common = negative > 0.001
    return torch.where(common, mean - deviation * density / torch.where(common, negative, 1.0), -3 * deviation)


def assignment(costs: Tensor) -> Tensor:
    """Return a different column for each row, with the smallest sum of costs r x c, where r <= c.

    Rows are added one by one. Each takes the shortest augmenting path in the reduced costs (Jonker and Volgenant 1987).
    """
    costs = costs.detach().double().cpu()
    rows, columns = costs.shape
    row_price, column_price = costs.new_zeros(rows), costs.new_zeros(columns)
    row_of = [-1] * columns
    for new_row in range(rows):
        shortest = costs.new_full((columns,), torch.inf)
        done = torch.zeros(columns, dtype=torch.bool)
        before = torch.full((columns,), -1)
        row, column, length = new_row, -1, 0.0
        while row >= 0:
            through = length + costs[row] - row_price[row] - column_price
            better = ~done & (through < shortest)
            shortest = torch.where(better, through, shortest)
            before[better] = column
            column = int(shortest.masked_fill(done, torch.inf).argmin())
            length = float(shortest[column])
            done[column] = True
            row = row_of[column]
        row_price[new_row] += length
        for other in done.nonzero().flatten().tolist():
            slack = length - shortest[other]
            column_price[other] -= slack
            if row_of[other] >= 0:
                row_price[row_of[other]] += slack
        while column >= 0:
            previous = int(before[column])
            row_of[column] = new_row if previous < 0 else row_of[previous]
            column = previous
    found = torch.empty(rows, dtype=torch.int64)
    for column, row in enumerate(row_of):
        if row >= 0:
            found[row] = column
    return found
