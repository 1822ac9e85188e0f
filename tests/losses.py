"""The table of every public loss, which tests share.

``LOSSES[name]`` is a function of student and teacher, and the shapes of both for a batch and a width. A block of
``kdkernels.use_backend`` chooses the backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import kdkernels
from kdkernels import nn
from kdkernels.ops.congruence import congruence
from kdkernels.ops.operator import OPERATORS, Operator

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Loss(NamedTuple):
    function: Callable[[Tensor, Tensor], Tensor]
    shapes: Callable[[int, int], Shapes]
    separate: bool = False  # each network has a part of its own, in its own precision
    device: str = "cpu"

    def draw(self, batch: int = 6, width: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return random inputs for student and teacher, which want no gradient."""
        return [torch.randn(shape, device=self.device).to(dtype) for shape in self.shapes(batch, width)]


def logits(batch: int, width: int) -> Shapes:
    return (batch, width), (batch, width)


def columns_of_logits(batch: int, width: int) -> Shapes:
    """At least five rows. The correlation of two numbers is 1 or -1, and its gradient is what rounding leaves of it."""
    return (batch + 3, width), (batch + 3, width)


def rows(batch: int, width: int) -> Shapes:
    return (batch, width), (batch, width + 2)


def images_of_rows(batch: int, width: int) -> Shapes:
    """Three rows for each image."""
    return (3 * batch, width), (3 * batch, width + 2)


def tokens(batch: int, width: int) -> Shapes:
    """At least two numbers. The direction of one number is 1 or -1, and its gradient is rounding over the number."""
    return (batch, 7, max(width, 2)), (batch, 7, width + 2)


def maps(batch: int, width: int) -> Shapes:
    return (batch, width, 4, 4), (batch, width + 1, 4, 8)


def maps_of_one_width(batch: int, width: int) -> Shapes:
    return (batch, width, 4, 4), (batch, width, 4, 8)


def maps_of_one_size(batch: int, width: int) -> Shapes:
    return (batch, width, 4, 8), (batch, width, 4, 8)


def in_full(x: Tensor) -> Tensor:
    """Return half-precision numbers as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_labels(student: Tensor, teacher: Tensor) -> Tensor:
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    return kdkernels.teacher_free_kd_loss(student, teacher, labels)


def of_known_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher's three most probable classes are known."""
    dtype = torch.promote_types(in_full(student).dtype, teacher.dtype)
    values, indices = teacher.to(dtype).log_softmax(1).topk(min(3, teacher.shape[1]))
    return kdkernels.kd_loss(student, values, teacher_indices=indices)


def of_others(student: Tensor, teacher: Tensor) -> Tensor:
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    return kdkernels.dkd_loss(student, teacher, labels, alpha=1.5, beta=2.0)


def of_maps(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = map(kdkernels.inter_class_correlation, (student, teacher))
    return (own - other).square().sum() + own.diagonal().sum()


def of_rows(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    dtype = torch.promote_types(in_full(student).dtype, teacher.dtype)
    own, other = (1 * x.to(dtype) for x in (student, teacher))  # new tensors, as the rows of patches are
    return congruence(own, other, positions=3, coefficients=(1, 0.5, 2, 0.3), form=form)


def of_patches(student: Tensor, teacher: Tensor) -> Tensor:
    return (kdkernels.local_correlation(student, 2) - kdkernels.local_correlation(teacher, 2)).square().sum()


def stages(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.local_correlation_loss([student, student.mT], [teacher, teacher.mT], [2, 1])


def masked(student: Tensor, teacher: Tensor) -> Tensor:
    """Patches of a box whose sides k = 3 does not divide."""
    height, width = teacher.shape[2:]
    mask = torch.linspace(0, 1, height * width, device=teacher.device).view(height, width).expand(len(teacher), -1, -1)
    settings = {"weights": (1.0, 0.5, 0.3), "mask": mask, "threshold": 0.4, "partition": "resize"}
    return kdkernels.local_correlation_loss(student, teacher, 3, **settings)


def cross_layer(student: Tensor, teacher: Tensor) -> Tensor:
    """The weights depend on the teacher, so they have a gradient where the teacher has one."""
    weights = in_full(teacher).flatten(1).mean(1)[:, None, None].sigmoid() * torch.ones(2, device=teacher.device)
    return kdkernels.cross_layer_mse([[student, student]], [[teacher, teacher.flip(1)]], weights)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations of queries and keys."""
    own, other = (student, student.flip(1)), (teacher, teacher.flip(1))
    settings = {"comparison": "cross_entropy", "normalize": False, "temperature": (4.0, 5.0)}
    return kdkernels.token_relation_loss(own, other, **settings)


def contrastive(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarities of the samples with the samples in another order."""
    scales = {"student_scale": 5.0, "teacher_scale": 3.0}
    return kdkernels.contrastive_relation_loss(student, student.flip(0), teacher, teacher.flip(0), **scales)


def relations(**settings: object) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(kdkernels.token_relation_loss, **settings)


def of_matrices(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = kdkernels.similarity_matrices([student, teacher])
    return (a - b).square().mean()


def cckd(**settings: object) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(kdkernels.correlation_congruence_loss, **settings)


def lkd(**settings: object) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(kdkernels.local_correlation_loss, k=2, **settings)


def sp(form: str) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(kdkernels.similarity_preserving_loss, form=form)


LOSSES: dict[str, Loss] = {
    "kd": Loss(kdkernels.kd_loss, logits),
    "divergence, reverse": Loss(functools.partial(kdkernels.kd_loss, divergence="reverse"), logits),
    "divergence, jsd": Loss(functools.partial(kdkernels.kd_loss, divergence="jsd", standardize=True), logits),
    "divergence, top-k": Loss(of_known_classes, logits),
    "teacher_free_kd": Loss(of_labels, logits),
    "dkd": Loss(of_others, logits),
    "dist": Loss(kdkernels.dist_loss, columns_of_logits),
    "logit_mse": Loss(kdkernels.logit_mse_loss, logits),
    "icc": Loss(kdkernels.inter_class_correlation_loss, logits),
    "icc per sample": Loss(functools.partial(kdkernels.inter_class_correlation_loss, per_sample=True), logits),
    "icc map": Loss(of_maps, logits, separate=True),
    "correlation_congruence": Loss(cckd(), rows),
    "correlation_congruence, raw rows": Loss(cckd(normalize=False, order=3), rows),
    "correlation_congruence rbf": Loss(cckd(kernel="rbf"), rows),
    "correlation_congruence rbf, raw rows": Loss(cckd(kernel="rbf", normalize=False), rows),
    "correlation_congruence bilinear, raw rows, Gram form": Loss(
        cckd(kernel="bilinear", form="gram", normalize=False), rows
    ),
    "correlation_congruence bilinear, feature form": Loss(cckd(kernel="bilinear", form="feature"), rows),
    "correlation_congruence mmd": Loss(cckd(kernel="mmd"), rows),
    "correlation_congruence mmd, raw rows": Loss(cckd(kernel="mmd", normalize=False), rows),
    "rkd": Loss(kdkernels.relational_kd_loss, rows),
    "pkt": Loss(kdkernels.probabilistic_transfer_loss, rows),
    "congruence, Gram form": Loss(functools.partial(of_rows, form="gram"), images_of_rows),
    "congruence, feature form": Loss(functools.partial(of_rows, form="feature"), images_of_rows),
    "similarity_preserving, Gram form": Loss(sp("gram"), maps),
    "similarity_preserving, feature form": Loss(sp("feature"), maps),
    "attention_transfer": Loss(kdkernels.attention_transfer_loss, maps, separate=True),
    "local_correlation": Loss(lkd(), maps, separate=True),
    "local_correlation, Gram form": Loss(lkd(form="gram", weights=(1.0, 0.5, 0.3)), maps, separate=True),
    "local_correlation, feature form": Loss(lkd(form="feature", weights=(1.0, 0.5, 0.3)), maps, separate=True),
    "local_correlation stages": Loss(stages, maps, separate=True),
    "local_correlation masked": Loss(masked, maps, separate=True),
    "patches": Loss(of_patches, maps, separate=True),
    "channel_wise": Loss(kdkernels.channel_wise_loss, maps_of_one_size),
    "hint": Loss(kdkernels.hint_loss, maps_of_one_width),
    "feature_mse": Loss(cross_layer, maps_of_one_width, separate=True),
    "gram": Loss(of_matrices, maps, separate=True),
    "token_relation": Loss(relations(form="gram"), tokens),
    "token_relation, feature form": Loss(relations(form="feature"), tokens),
    "token_relation, clipped": Loss(relations(clip="both", across="batch"), tokens),
    "token_relation hinge": Loss(relations(comparison="hinge", margin=0.1), tokens),
    "token_relation kl": Loss(relations(comparison="kl", temperature=0.2), tokens),
    "token_relation of queries and keys": Loss(attention, tokens),
    "token_relation, contrastive": Loss(contrastive, rows),
}


def projections(student: Tensor, teacher: Tensor) -> Tensor:
    """SemCKD with projections. Their convolutions are an operator that no loss in the table calls."""
    calibration = nn.SemanticCalibration([student.shape[1]], [teacher.shape[1]], batch_size=len(student))
    return nn.SemCKDLoss()(*calibration.to(student)([student], [teacher]))


# Native convolutions need a multiple of 32 channels, and as many blocks of pixels as there are threads.
PROJECTIONS = Loss(projections, lambda batch, width: ((16, 32, 8, 8), (16, 64, 8, 8)))


@functools.cache
def operators(name: str) -> frozenset[str]:
    """Return the operators with kernels that a loss calls. If there are none, PyTorch's own operators compute it."""
    return operators_of(LOSSES[name].function, *LOSSES[name].draw())


def operators_of(function: Callable[..., Tensor], *tensors: Tensor) -> frozenset[str]:
    reached, choose = set(), Operator.choose

    def record(self: Operator, *arguments: object, **settings: object) -> str:
        if self.kernels:
            reached.add(self.name)
        return choose(self, *arguments, **settings)

    with mock.patch.object(Operator, "choose", record), kdkernels.use_backend("reference"):
        function(*tensors)
    return frozenset(reached)


def runs_on(name: str, backend: str, device: str = "cpu") -> bool:
    """Return whether the loss has kernels of its own in a backend, for a kind of device."""
    used = [OPERATORS[operator] for operator in operators(name)]
    if backend == "reference":
        return True
    if backend == "library":  # LKD's patches are no products, and neither are the means of MMD
        used = [x for x in used if x.name != "patches"]
        return bool(used) and all(x.large is not None for x in used) and "mmd" not in name
    return bool(used) and all(x.triton if backend == "triton" else device in x.native for x in used)
