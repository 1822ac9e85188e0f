"""Token losses of other trainers, by their names and signatures, on the fused kernels of ``token_relation_loss``.

Import a name in place of the host's own:

    from kdkernels.integrations.tokens import GramLoss                            # DINOv3
    from kdkernels.integrations.tokens import DistillationV3Loss                  # LightlyTrain
    from kdkernels.integrations.tokens import DistillClipLoss                     # OpenCLIP
    from kdkernels.integrations.tokens import vf_loss                             # LightningDiT (VA-VAE)
    from kdkernels.integrations.tokens import token_relation_distillation_loss    # VideoREPA

Values and gradients equal the originals'. Masks, maps in any strides and tokens of different widths work in addition,
through ``token_relation_loss`` itself.

Examples:
    >>> import torch
    >>> from kdkernels.integrations.tokens import GramLoss
    >>> GramLoss()(torch.randn(2, 196, 384), torch.randn(2, 196, 768)).shape
    torch.Size([])
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..types import Clip

__all__ = ["DistillClipLoss", "DistillationV3Loss", "GramLoss", "token_relation_distillation_loss", "vf_loss"]


class GramLoss(nn.Module):
    """DINOv3's Gram anchoring: the mean squared error of the similarities of tokens, without negative ones.

    Call it with B x N x dim tokens of both networks, or with B·N x dim tokens and ``img_level=False``, which compares
    all tokens of the batch. The original reads ``img_level`` only in the call, and so does this class. With
    ``remove_only_teacher_neg``, the original leaves the student's similarities as they are, because it looks for the
    teacher's negative ones after it has removed them.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise AssertionError("remove_neg and remove_only_teacher_neg exclude each other, got True for both")
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        clip: Clip | None = "both" if self.remove_neg else "teacher_only" if self.remove_only_teacher_neg else None
        return functional.token_relation_loss(
            _at_most_float32(output_feats),
            _at_most_float32(target_feats),
            clip=clip,
            across="image" if img_level else "batch",
            normalize=self.apply_norm,
        )


def _at_most_float32(features: Tensor) -> Tensor:
    """Return float64 features in float32, as the original does. Half precision is read as it is."""
    return features.float() if features.dtype == torch.float64 else features


class DistillationV3Loss(nn.Module):
    """LightlyTrain's third distillation loss: divergences of the similarities to a queue, and among tokens.

    Call it with B x dim global and B x n x dim local features of teacher and student, and with a queue of teacher
    features, all divided by their norms. It returns the global and the local loss.
    """

    def __init__(self, temperature_global: float, temperature_local: float) -> None:
        super().__init__()
        self.temperature_global = temperature_global
        self.temperature_local = temperature_local

    def forward(
        self,
        teacher_features_global: Tensor,
        teacher_features_local: Tensor,
        student_features_global: Tensor,
        student_features_local: Tensor,
        queue: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss = functools.partial(functional.token_relation_loss, comparison="kl", normalize=False)
        of_batch = loss(
            (student_features_global, queue),
            (teacher_features_global, queue),
            across="batch",
            temperature=self.temperature_global,
        )
        of_tokens = loss(student_features_local, teacher_features_local, temperature=self.temperature_local)
        return of_batch, of_tokens


class DistillClipLoss(nn.Module):
    """OpenCLIP's distillation: the contrastive loss, and cross-entropies of the similarities of images and texts.

    Call it with b x dim image and text features and the logit scale of the student, then of the teacher. It returns the
    contrastive and the distillation loss, or a dict of them. The distillation loss needs no b x b matrix.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        own, other = [image_features, text_features], [dist_image_features, dist_text_features]
        all_own, all_other = ([self._gathered(x) for x in features] for features in (own, other))
        if not self.local_loss:
            own, other = all_own, all_other
        scaled = [logit_scale * _in_full(x) for x in own], [dist_logit_scale * _in_full(x) for x in other]
        labels = torch.arange(len(own[0]), device=own[0].device)
        if self.local_loss:
            labels = labels + self.rank * len(labels)
        contrastive, distill = [], []
        for first, second in ((0, 1), (1, 0)):  # images against texts, and texts against images
            contrastive.append(F.cross_entropy(scaled[0][first] @ _in_full(all_own[second]).T, labels))
            distill.append(
                functional.token_relation_loss(
                    (scaled[0][first], all_own[second]),
                    (scaled[1][first], all_other[second]),
                    comparison="cross_entropy",
                    across="batch",
                    normalize=False,
                )
            )
        contrastive_loss, distill_loss = sum(contrastive) / 2, sum(distill) / 2
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss

    def _gathered(self, features: Tensor) -> Tensor:
        """Return the features of all ranks. Only this rank's features get a gradient, unless ``gather_with_grad``."""
        if self.world_size == 1:
            return features
        if self.gather_with_grad:
            from torch.distributed.nn.functional import all_gather

            return torch.cat(all_gather(features))
        everyone = [torch.zeros_like(features) for _ in range(self.world_size)]
        dist.all_gather(everyone, features.contiguous())
        if not self.local_loss:
            everyone[self.rank] = features
        return torch.cat(everyone)


def _in_full(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def vf_loss(
    z: Tensor,
    aux_feature: Tensor,
    distmat_margin: float = 0,
    cos_margin: float = 0,
    distmat_weight: float = 1.0,
    cos_weight: float = 1.0,
) -> Tensor:
    """Return VA-VAE's loss of LightningDiT between latents and the features of a vision model.

    It is the hinge of the similarities among pixels, and the hinge of the cosine between both maps at each pixel.

    Args:
        z: b x c x h x w latents.
        aux_feature: b x c x h x w features.
        distmat_margin: the margin between similarities.
        cos_margin: the margin between cosines.
        distmat_weight: the factor of the first term.
        cos_weight: the factor of the second term.
    """
    relations = functional.token_relation_loss(z, aux_feature, comparison="hinge", margin=distmat_margin)
    cosines = F.cosine_similarity(_in_full(aux_feature), _in_full(z))
    return distmat_weight * relations + cos_weight * F.relu(1 - cos_margin - cosines).mean()


def token_relation_distillation_loss(
    align: Tensor, align_target: Tensor, margin: float = 0.1, only_spatial: bool = False
) -> Tensor:
    """Return VideoREPA's token relation distillation between the features of a video model and its teacher.

    Args:
        align: B x F x HW x C tokens of F frames.
        align_target: the teacher's tokens, with any number of channels.
        margin: differences of cosines up to ``margin`` cost nothing.
        only_spatial: relate the tokens of each frame only. By default, all tokens of a video are related.
    """
    student, teacher = (x.flatten(0, 1) if only_spatial else x.flatten(1, 2) for x in (align, align_target))
    return functional.token_relation_loss(student, teacher, comparison="hinge", margin=margin)
