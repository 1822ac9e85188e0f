"""The losses of RepDistiller and of SemCKD's trainer, by their names and signatures, on fused kernels.

One more line below the imports of either's train_student.py:

    from kdkernels.integrations.repdistiller import *

Numbers and gradients are the originals', so that published weights carry over. Unlike them, these read channels_last
maps, and dead or duplicate rows have finite gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn.semckd import new_projection, project

__all__ = ["PKT", "Attention", "DistillKL", "HintLoss", "RKDLoss", "SelfA", "SemCKDLoss", "Similarity"]


class DistillKL(nn.Module):
    """Softened KL divergence times T²: ``kdkernels.kd_loss``."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return functional.kd_loss(y_s, y_t, temperature=self.T)


class HintLoss(nn.Module):
    """Mean squared error of the regressed hint, a map or pooled features: ``kdkernels.hint_loss``."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        if f_s.dim() == 2:
            f_s, f_t = f_s[:, :, None, None], f_t[:, :, None, None]
        return functional.hint_loss(f_s, f_t)


class Attention(nn.Module):
    """A list of attention-transfer losses, one per stage. The larger map is pooled before its attention is taken.

    The square, p = 2, is the one that is published: ``kdkernels.attention_transfer_loss``.
    """

    def __init__(self, p: int = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one stage."""
        size = min(f_s.shape[2], f_t.shape[2])
        f_s, f_t = (F.adaptive_avg_pool2d(f, size) if f.shape[2] > size else f for f in (f_s, f_t))
        if self.p == 2:
            return functional.attention_transfer_loss(f_s, f_t)
        return (self.at(f_s) - self.at(f_t)).square().mean()

    def at(self, f: Tensor) -> Tensor:
        """The attention of one stage's maps, for another p than 2."""
        return F.normalize(f.pow(self.p).mean(1).flatten(1))


class Similarity(nn.Module):
    """A list of similarity-preserving losses, one per layer: ``kdkernels.similarity_preserving_loss``."""

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one layer."""
        return functional.similarity_preserving_loss(f_s, f_t).view(1)  # the original's shape


class RKDLoss(nn.Module):
    """Distance and angle relations, weighted: ``kdkernels.relational_kd_loss``."""

    def __init__(self, w_d: float = 25, w_a: float = 50) -> None:
        super().__init__()
        self.w_d = w_d
        self.w_a = w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return functional.relational_kd_loss(
            f_s.flatten(1), f_t.detach().flatten(1), distance_weight=self.w_d, angle_weight=self.w_a
        )


class PKT(nn.Module):
    """Probabilistic knowledge transfer with the eps of the original inside its logarithms and beside its norms.

    ``kdkernels.probabilistic_transfer_loss`` is the paper's, without them.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.cosine_similarity_loss(f_s, f_t)

    @staticmethod
    def cosine_similarity_loss(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        # In float32 nothing would be left of the difference of networks that nearly agree.
        q, p = (_affinities(rows.double(), eps) for rows in (output_net, target_net))
        loss = (p * torch.log((p + eps) / (q + eps))).mean()
        return loss.to(torch.promote_types(output_net.dtype, target_net.dtype))


def _affinities(rows: Tensor, eps: float) -> Tensor:
    # vector_norm has gradient 0 at 0, where a square root of a sum has none.
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    similarities = (unit @ unit.mT + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


class SemCKDLoss(nn.Module):
    """Weighted cross-layer error, divided by b·s_L: ``kdkernels.cross_layer_mse``. Pools maps of different sizes."""

    def forward(
        self, s_value: Sequence[Sequence[Tensor]], f_target: Sequence[Sequence[Tensor]], weight: Tensor
    ) -> Tensor:
        return functional.cross_layer_mse(s_value, f_target, weight)


class SelfA(nn.Module):
    """SemCKD's attention and projections, with the original's parameter names: its checkpoints load.

    The similarity matrices of all layers are one call, and the projections are computed as those of
    ``kdkernels.nn.SemanticCalibration``: they keep less for the backward pass. A batch smaller than ``input_channel``
    works: its similarities are padded with zeros.
    """

    def __init__(
        self, s_len: int, t_len: int, input_channel: int, s_n: Sequence[int], s_t: Sequence[int], factor: int = 4
    ) -> None:
        super().__init__()
        self.input_channel = input_channel
        for j in range(t_len):
            self.add_module(f"key_weight{j}", _MLPEmbed(input_channel, input_channel // factor))
        for i in range(s_len):
            self.add_module(f"query_weight{i}", _MLPEmbed(input_channel, input_channel // factor))
        for i in range(s_len):
            for j in range(t_len):
                self.add_module(f"regressor{i}{j}", _AAEmbed(s_n[i], s_t[j]))

    def forward(
        self, feat_s: Sequence[Tensor], feat_t: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], Tensor]:
        similarities = functional.similarity_matrices([*feat_s, *feat_t])
        missing = self.input_channel - feat_s[0].shape[0]
        similarities = F.pad(similarities, (0, missing)).unbind()
        queries = self._embed("query_weight", similarities[: len(feat_s)])
        keys = self._embed("key_weight", similarities[len(feat_s) :])
        attention = (queries @ keys.mT).softmax(-1)
        projected: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        for i, student in enumerate(feat_s):
            projections = [getattr(self, f"regressor{i}{j}").regressor for j in range(len(feat_t))]
            projected.append(project(student, projections, feat_t))
            targets.append([_pooled(teacher, min(student.shape[2], teacher.shape[2])) for teacher in feat_t])
        return projected, targets, attention

    def _embed(self, name: str, similarities: Sequence[Tensor]) -> Tensor:
        """b x layers x features."""
        return torch.stack([getattr(self, f"{name}{i}")(rows) for i, rows in enumerate(similarities)], 1)


def _pooled(features: Tensor, size: int) -> Tensor:
    return features if features.shape[2] == size else F.adaptive_avg_pool2d(features, size)


class _MLPEmbed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, 2 * outputs)
        self.linear2 = nn.Linear(2 * outputs, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.linear2(F.relu(self.linear1(rows))))


class _AAEmbed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.regressor = new_projection(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.regressor(features)
