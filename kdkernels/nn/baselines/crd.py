"""Contrastive representation distillation (CRD) with its memory bank."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks, distributed, groups
from ...distributed import Ranks
from ...ops.autograd import LossWithGradients, needs_gradient
from ...ops.shapes import accumulation_dtype
from ...types import Group
from ..base import SettingsModule
from ..semckd import unit
from . import shapes

__all__ = ["CRDLoss"]

_EPS = 1e-7  # which the authors' program adds to N / M


@dataclass(eq=False, repr=False)
class CRDLoss(SettingsModule):
    """Tell the same image's embedding in the other network from other images' embeddings, CRD (Tian et al. 2020).

    Linear maps and division by the norm give embeddings g_S and g_T of d numbers. Each embedding is compared with one
    positive and N negatives, which a memory holds for every image of the training set, M images in all. With
    ``h = s / (s + N / M)`` and ``s = exp(g_S · g_T / τ) / Z``, the loss (Eq. 18) is the mean over the batch of
    ``−log h(positive) − Σ log(1 − h(negative))``. It is computed with the student's embeddings against the memory of
    the teacher and with the teacher's embeddings against the memory of the student, and both are added.

    The first training batch sets Z, the mean of exp(...) times M. In training, each call moves the memory of the
    images of the batch: ``m · memory + (1 − m) · embedding``, divided by its norm. In evaluation, nothing changes.
    Memory and Z are buffers, so a checkpoint has them. Train the two linear maps with the student: give the module's
    parameters to the optimizer. An embedding of norm 0 gives the loss of orthogonal embeddings and no gradient.

    Args:
        student_width: the width of the student's embeddings.
        teacher_width: the width of the teacher's embeddings.
        samples: M, the images of the training set.
        embedding_width: d.
        negatives: N, how many negatives are drawn for each image, uniformly from the training set.
        temperature: τ > 0.
        momentum: m, in [0, 1].
        group: the process group that shares the batch, "world" for the default group, or None for one process. The
            memory of every process then moves with the images of all processes. The memories must be equal at the
            start, so make the module with the same seed in all processes.

    Memory:
        The memory bank has 2·M·d numbers. A call takes 2·b·M numbers for the products with all of it, and 2·b·N numbers
        for the chosen. No tensor of b x N x d exists.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import CRDLoss
        >>> crd = CRDLoss(student_width=64, teacher_width=256, samples=1000, negatives=128)
        >>> student, teacher = torch.randn(32, 64, requires_grad=True), torch.randn(32, 256)
        >>> images = torch.randperm(1000)[:32]  # the number of each image in the training set
        >>> loss = 0.8 * crd(student, teacher, images)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([32, 64])
    """

    student_width: int
    teacher_width: int
    samples: int
    _: KW_ONLY
    embedding_width: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    group: Group = None

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.embedding_width
        self.student_embedding = nn.Linear(self.student_width, width)
        self.teacher_embedding = nn.Linear(self.teacher_width, width)
        bound = math.sqrt(3 / width)  # rows of norm 1 on average
        self.student_memory: Tensor  # M x d
        self.teacher_memory: Tensor  # M x d
        self.log_normalizers: Tensor  # of the student's embeddings and the teacher's, NaN until they are set
        self.register_buffer("student_memory", torch.empty(self.samples, width).uniform_(-bound, bound))
        self.register_buffer("teacher_memory", torch.empty(self.samples, width).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.full((2,), math.nan))

    def check(self) -> None:
        super().check()
        for name in ("student_width", "teacher_width", "samples", "embedding_width", "negatives"):
            checks.positive_int(name, getattr(self, name))
        checks.positive("temperature", self.temperature)
        checks.fraction("momentum", self.momentum)

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: b x d_S embeddings, float32, float64, bfloat16 or float16, any strides.
            teacher: b x d_T embeddings. They receive a gradient only if they require one.
            images: the number of each image in the training set, b integers from 0 to M − 1. An image should occur once
                in a batch.
            negatives: b x N numbers of the images that each image is compared with. By default, N = ``negatives`` are
                drawn.

        Returns:
            A scalar: float64 if an input is float64, otherwise float32.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape, a number of an image or a setting does not fit, with the same parts in the message.
        """
        self.check()
        student = shapes.embeddings("student", student, self.student_width)
        teacher = shapes.embeddings("teacher", teacher, self.teacher_width)
        shapes.same_samples("teacher", teacher, "student", student)
        images = shapes.indices("images", images, (len(student),), self.samples, student)
        chosen = torch.cat([images[:, None], self._negatives(negatives, student)], 1)
        dtype = accumulation_dtype(student, teacher)
        group = groups.resolve(self.group)
        ranks = None if group is None else self._meet(group, student, chosen)
        with torch.autocast(student.device.type, enabled=False):  # exp(1 / 0.07) overflows in half precision
            of_student = unit(self.student_embedding(student.to(self.student_embedding.weight.dtype)).to(dtype))
            of_teacher = unit(self.teacher_embedding(teacher.to(self.teacher_embedding.weight.dtype)).to(dtype))
            parts = [
                self._contrast(of_student, self.teacher_memory, chosen, 0, ranks),
                self._contrast(of_teacher, self.student_memory, chosen, 1, ranks),
            ]
        if self.training:
            self._update(images, of_student.detach(), of_teacher.detach(), ranks)
        loss = parts[0] + parts[1]
        return loss if ranks is None else distributed.sum_over(ranks, loss)

    def _negatives(self, given: Tensor | None, student: Tensor) -> Tensor:
        if given is None:
            return torch.randint(self.samples, (len(student), self.negatives), device=student.device)
        width = given.shape[1] if isinstance(given, Tensor) and given.dim() == 2 else self.negatives
        return shapes.indices("negatives", given, (len(student), width), self.samples, student)

    def _meet(self, group: Group, student: Tensor, chosen: Tensor) -> Ranks:
        terms: dict[str, object] = {"the number of negatives": chosen.shape[1] - 1, "the size of memory": self.samples}
        if self.log_normalizers[0].isnan():  # only at the start, because copies may round differently later
            terms["the start of memory"] = self.student_memory[0, 0].item(), self.teacher_memory[0, 0].item()
        return distributed.agree(group, len(student), student.device, **terms)

    def _contrast(self, anchors: Tensor, memory: Tensor, chosen: Tensor, index: int, ranks: Ranks | None) -> Tensor:
        """Return the loss of one network's embeddings b x d against the memory M x d of the other network.

        The gradient is computed at once, because the memory changes before the backward pass.
        """
        wanted = needs_gradient(anchors)
        with torch.no_grad():
            memory = memory.to(anchors.dtype)
            scores = (anchors @ memory.T).gather(1, chosen) / self.temperature  # b x (1 + N), the positive first
            scores = scores - self._log_normalizer(scores, index, ranks)
            noise = (chosen.shape[1] - 1) / self.samples  # N / M
            margins = scores - math.log(noise + _EPS)
            samples = len(anchors) if ranks is None else ranks.samples
            positives, negatives = F.logsigmoid(margins[:, :1]), F.logsigmoid(-margins[:, 1:])
            constant = (chosen.shape[1] - 1) * len(anchors) * math.log(noise / (noise + _EPS))
            loss = -(positives.sum() + negatives.sum() + constant) / samples
            if not wanted:
                return loss
            slopes = margins.sigmoid()
            slopes[:, 0] -= 1
            of_memory = slopes.new_zeros(len(anchors), self.samples).scatter_add_(1, chosen, slopes)
            gradient = of_memory @ memory / (self.temperature * samples)
        return LossWithGradients.apply(lambda *_: (loss, gradient), (), (), anchors)[0]  # type: ignore[no-any-return]

    def _log_normalizer(self, scores: Tensor, index: int, ranks: Ranks | None) -> Tensor:
        """Return log Z. The first training batch sets it, and a batch in evaluation before this uses its own."""
        total = scores.double().exp().sum()
        count = torch.full_like(total, scores.numel())
        if ranks is not None:
            total, count = distributed.add(ranks, total, count)
        own = (total * self.samples / count).log().to(self.log_normalizers.dtype)
        value = self.log_normalizers[index]
        value = torch.where(value.isnan(), own, value)
        if self.training:
            self.log_normalizers[index] = value
        return value.to(scores.dtype)

    def _update(self, images: Tensor, of_student: Tensor, of_teacher: Tensor, ranks: Ranks | None) -> None:
        if ranks is not None:
            images = distributed.rows_of_all(ranks, images[:, None])[:, 0]
            of_student, of_teacher = (distributed.rows_of_all(ranks, rows) for rows in (of_student, of_teacher))
        for memory, rows in ((self.student_memory, of_student), (self.teacher_memory, of_teacher)):
            old = memory[images].to(rows.dtype)
            moved = unit(self.momentum * old + (1 - self.momentum) * rows)
            memory.index_copy_(0, images, moved.to(memory.dtype))
