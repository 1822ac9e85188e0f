"""Adversarial distillation: the student learns to deceive a discriminator of its embeddings and the teacher's."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ... import checks
from ...ops.shapes import accumulation_dtype
from ..base import SettingsModule
from . import shapes

__all__ = ["AdversarialLoss"]


@dataclass(eq=False, repr=False)
class AdversarialLoss(SettingsModule):
    """Train the student's embeddings to pass for the teacher's, Adv in CCKD's tables (Xu et al. 2018).

    The discriminator is CCKD's: FC(d x h) - BN - ReLU - FC(h x 2) - sigmoid. Its first output says "student" and its
    second output says "teacher". ``discriminator_loss`` is the mean binary cross-entropy of both outputs for all
    embeddings, and trains the discriminator only. The module's call returns the mean binary cross-entropy of the
    student's embeddings with the teacher's labels, and trains the student only. Each has its own optimizer.

    CCKD does not say which samples share the statistics of BN. Here they are all embeddings of both networks in a
    batch, because with separate statistics the discriminator could not see a difference of means.

    Args:
        width: d, of both networks' embeddings. CCKD maps them to 128 by a linear layer in each network.
        hidden_width: h.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import AdversarialLoss
        >>> adversary = AdversarialLoss(width=128)
        >>> optimizer = torch.optim.SGD(adversary.parameters(), lr=0.1)
        >>> student, teacher = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> adversary.discriminator_loss(student, teacher).backward()
        >>> optimizer.step()
        >>> adversary(student, teacher).backward()
        >>> student.grad.shape
        torch.Size([32, 128])
    """

    width: int = 128
    _: KW_ONLY
    hidden_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.discriminator = nn.Sequential(
            nn.Linear(self.width, self.hidden_width),
            nn.BatchNorm1d(self.hidden_width, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(self.hidden_width, 2),
        )

    def check(self) -> None:
        super().check()
        checks.positive_int("width", self.width)
        checks.positive_int("hidden_width", self.hidden_width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's loss, a scalar: float64 if an input is float64, otherwise float32.

        Args:
            student: b x d embeddings.
            teacher: b x d embeddings. They and the discriminator receive no gradient.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        dtype = accumulation_dtype(student, teacher)
        student, teacher = self._checked(student, teacher)
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with torch.autocast(student.device.type, enabled=False):
            scores = functional_call(self.discriminator, frozen, (torch.cat([student, teacher.detach()]),))
            return _cross_entropy(scores[: len(student)], of_teacher=True).to(dtype)

    def discriminator_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the discriminator's loss, a scalar. It takes the arguments of the module's call."""
        student, teacher = self._checked(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            scores = self.discriminator(torch.cat([student.detach(), teacher.detach()]))
            own, other = scores[: len(student)], scores[len(student) :]
            return (_cross_entropy(own, of_teacher=False) + _cross_entropy(other, of_teacher=True)) / 2

    def _checked(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        self.check()
        student = shapes.embeddings("student", student, self.width)
        teacher = shapes.embeddings("teacher", teacher, self.width)
        shapes.same_samples("teacher", teacher, "student", student)
        dtype = next(self.parameters()).dtype
        return student.to(dtype), teacher.to(dtype)


def _cross_entropy(scores: Tensor, *, of_teacher: bool) -> Tensor:
    """Return the mean binary cross-entropy of the scores n x 2 before the sigmoid."""
    scores = scores.to(accumulation_dtype(scores))
    labels = torch.zeros_like(scores)
    labels[:, int(of_teacher)] = 1
    return F.binary_cross_entropy_with_logits(scores, labels)
