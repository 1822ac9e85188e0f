"""The losses of RepDistiller and of SemCKD's trainer, by their names and signatures, on fused kernels.

Add one line below the imports of train_student.py of either project:

    from kdkernels.integrations.repdistiller import *

Numbers and gradients equal the originals', so published weights stay valid. In addition, channels_last maps work, and
zero or duplicate rows have finite gradients.

Examples:
    >>> import torch
    >>> from kdkernels.integrations.repdistiller import RKDLoss
    >>> RKDLoss(w_d=25, w_a=50)(torch.randn(16, 32), torch.randn(16, 64)).shape
    torch.Size([])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn.semckd import hooked, new_projection, project

__all__ = ["PKT", "Attention", "DistillKL", "HintLoss", "RKDLoss", "SelfA", "SemCKDLoss", "Similarity"]


class DistillKL(nn.Module):
    """Softened KL divergence times T²: ``kdkernels.kd_loss``."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return functional.kd_loss(y_s, y_t, temperature=self.T, dim=1)


class HintLoss(nn.Module):
    """Mean squared error of the regressed hint, a map, tokens or pooled features: ``kdkernels.hint_loss``.

    Different shapes are broadcast or raise an error, as in the original.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        if f_s.shape != f_t.shape or not f_s.dim():
            return F.mse_loss(f_s.float(), f_t.float())
        return functional.hint_loss(_as_map(f_s), _as_map(f_t))


def _as_map(features: Tensor) -> Tensor:
    """Return features of any number of dimensions as a tensor with four dimensions."""
    return features.flatten(3) if features.dim() > 4 else features[(..., *[None] * (4 - features.dim()))]


class Attention(nn.Module):
    """A list of attention-transfer losses, one per stage. The larger map is pooled before its attention is taken.

    The published p = 2 is fused: ``kdkernels.attention_transfer_loss``. Other powers and shapes use the formula of the
    original.
    """

    def __init__(self, p: int = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Return the loss of one stage."""
        size = min(f_s.shape[2], f_t.shape[2])
        f_s, f_t = (F.adaptive_avg_pool2d(f, size) if f.shape[2] > size else f for f in (f_s, f_t))
        return attention_error(f_s, f_t, self.p)

    def at(self, f: Tensor) -> Tensor:
        """Return the attention of one stage's maps."""
        return _attention(f, self.p)


def attention_error(f_s: Tensor, f_t: Tensor, p: int = 2) -> Tensor:
    """Return the mean squared difference of attention. It is fused for maps of equal size, where the originals do not
    pool.
    """
    if p == 2 and f_s.dim() == f_t.dim() == 4 and f_s.shape[2:] == f_t.shape[2:]:
        return functional.attention_transfer_loss(f_s, f_t)
    return (_attention(f_s, p) - _attention(f_t, p)).square().mean()


def _attention(f: Tensor, p: int) -> Tensor:
    return F.normalize(f.to(torch.promote_types(f.dtype, torch.float32)).pow(p).mean(1).flatten(1))


class Similarity(nn.Module):
    """A list of similarity-preserving losses, one per layer: ``kdkernels.similarity_preserving_loss``."""

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Return the loss of one layer."""
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
    """Probabilistic knowledge transfer, with the original's eps inside the logarithms and added to the norms.

    ``kdkernels.probabilistic_transfer_loss`` is the paper's loss without them.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.cosine_similarity_loss(f_s, f_t)

    @staticmethod
    def cosine_similarity_loss(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        # float32 would lose the difference of networks that nearly agree.
        q, p = (_affinities(rows.double(), eps) for rows in (output_net, target_net))
        loss = (p * torch.log((p + eps) / (q + eps))).mean()
        return loss.to(torch.promote_types(output_net.dtype, target_net.dtype))


def _affinities(rows: Tensor, eps: float) -> Tensor:
    # vector_norm has gradient 0 at 0. The square root of a sum has none.
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    similarities: Tensor = (torch.mm(unit, unit.mT) + 1) / 2  # maps raise an error, as in the originals
    return similarities / similarities.sum(1, keepdim=True)


class SemCKDLoss(nn.Module):
    """Weighted cross-layer error, divided by b·s_L: ``kdkernels.cross_layer_mse``. Pools maps of different sizes."""

    def forward(
        self, s_value: Sequence[Sequence[Tensor]], f_target: Sequence[Sequence[Tensor]], weight: Tensor
    ) -> Tensor:
        projected, targets = (
            [[_as_map(features) for features in row] for row in of_layers] for of_layers in (s_value, f_target)
        )
        return functional.cross_layer_mse(projected, targets, weight)


class SelfA(nn.Module):
    """SemCKD's attention and projections, with the parameter names of the original, so that its checkpoints load.

    One call computes the similarity matrices of all layers. The projections are computed as in
    ``kdkernels.nn.SemanticCalibration`` and keep less for the backward pass. A batch smaller than ``input_channel``
    works, because its similarities are padded with zeros.
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
        rows = F.pad(similarities, (0, missing)).unbind()
        queries = self._embed("query_weight", rows[: len(feat_s)])
        keys = self._embed("key_weight", rows[len(feat_s) :])
        attention = (queries @ keys.mT).softmax(-1)
        projected: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        for i, student in enumerate(feat_s):
            modules = [getattr(self, f"regressor{i}{j}") for j in range(len(feat_t))]
            projections = [module.regressor if _direct(module) else module for module in modules]
            projected.append(project(student, projections, feat_t))
            targets.append([_pooled(teacher, min(student.shape[2], teacher.shape[2])) for teacher in feat_t])
        return projected, targets, attention

    def _embed(self, name: str, similarities: Sequence[Tensor]) -> Tensor:
        """Return the embeddings, b x layers x features."""
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


def _direct(module: nn.Module) -> bool:
    """Return whether the projection can be computed without calling it: it is neither wrapped nor hooked."""
    return type(module) is _AAEmbed and not hooked(module)


class _AAEmbed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.regressor = new_projection(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.regressor(features)
        return projected
