"""Semantic calibration (SemCKD): which teacher layers a student layer learns from, and the loss."""

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, checks, functional, groups
from ..ops import feature_mse
from ..ops.autograd import differentiable_once
from ..ops.convolution import convolution, convolution_backward
from ..ops.feature_mse.reference import smaller_size
from ..ops.shapes import accumulation_dtype
from ..types import ALLOCATIONS, Allocation, Backend, Group, Reduction
from .base import SettingsModule

__all__ = ["Calibration", "SemCKDLoss", "SemanticCalibration"]


class Calibration(NamedTuple):
    """What ``SemCKDLoss`` takes, in this order. The index i is a student layer, and j is a teacher layer.

    Attributes:
        projected: ``projected[i][j]`` is b x c_j x h x w, the student's features projected to the teacher's channels.
        targets: ``targets[i][j]`` is b x c_j x h' x w', the teacher's features, unchanged.
        attention: b x s_L x t_L, how much layer i of each sample learns from layer j. The sum over j is 1.
    """

    projected: list[list[Tensor]]
    targets: list[list[Tensor]]
    attention: Tensor


@dataclass(eq=False, repr=False)
class SemanticCalibration(SettingsModule):
    """Associate layers by a learned attention, and project the student's features (SemCKD Eqs. 4-10, 16).

    ``α = softmax_j(Q_i · K_j / τ)`` per sample. The queries Q_i of student layers and the keys K_j of teacher layers
    come from the rows of their similarity matrices. Each layer has an MLP: Linear(B, 2e) - ReLU - Linear(2e, e), then
    division by the L2 norm, with e = B / 4 for batches of B samples. Each student layer is projected to the channels of
    each teacher layer by 1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 convolutions without biases. The hidden layers have
    twice the teacher's channels. If the student's map is the larger, it is averaged down before the projection. If the
    teacher's map is the larger, the loss averages it down. Train the module with the student: give its parameters to
    the optimizer.

    Queries, keys and attention are float32 (float64 for float64 features), for any dtype of the module and under
    autocast, because similarities overflow in half precision.

    The parameters lie in the order of the authors' ``SelfA``: keys, queries, projections. With the same parameters,
    attention and projected maps are equal. There are two departures. A query or key of norm 0 is the zero vector, which
    attends to all layers equally, where ``SelfA`` gives NaN. And ``SelfA`` skips batches smaller than B.

    Args:
        student_shapes: the channels of each student layer, or its shape c x h x w without the batch.
        teacher_shapes: the channels or the shape of each teacher layer.
        batch_size: B, the width of the MLPs. The similarity rows of a smaller batch are filled up with zeros.
        temperature: τ > 0. 1 is SemCKD. 2 and 4 are the softened variant SemCKD_τ.
        allocation: "attention" is the paper's. "equal" is α = 1 / t_L. "shared" gives all samples the mean of their α
            (the w of Eq. 11). Table 6 compares them.
        mlp: False replaces each MLP by one linear map without normalisation (Table 6, "w/o MLP").
        similarity: False gives the features themselves to the MLPs. Then both shapes must be c x h x w (Table 6, "w/o
            Similarity Matrices").
        projection: False compares embeddings of the similarity rows, e numbers per layer, in place of feature maps
            (Table 6, "w/o Projection").
        backend: what computes the similarity matrices: "auto", "reference", "native" or "triton". On a CPU in training,
            "native" also computes the 3x3 convolutions if their channels are a multiple of 32.
        group: the process group that shares the batch, "world" for the default group, or None for one process. Samples
            are compared with the samples of all processes, together at most ``batch_size``. Pass it to ``SemCKDLoss``
            too. Convert the module with ``SyncBatchNorm.convert_sync_batchnorm`` to use the statistics of the whole
            batch.

    A projection that is wrapped, hooked or changed (FSDP, ``fully_shard``, parametrisations) is called as a module.
    So is a linear layer of an MLP.

    Memory:
        (s_L + t_L)·b² similarities. The projection of each pair of layers keeps two maps of 2·c_j channels. The outputs
        of the normalisations are computed again in the backward pass, so a second derivative raises an error. With
        backend="reference" they are kept, and second derivatives work.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import SemanticCalibration, SemCKDLoss
        >>> calibration = SemanticCalibration((8, 16), (16, 32, 64), batch_size=32)
        >>> student = [torch.randn(24, 8, 8, 8), torch.randn(24, 16, 4, 4)]
        >>> teacher = [torch.randn(24, 16, 8, 8), torch.randn(24, 32, 4, 4), torch.randn(24, 64, 2, 2)]
        >>> projected, targets, attention = calibration(student, teacher)
        >>> attention.shape
        torch.Size([24, 2, 3])
        >>> loss = 400 * SemCKDLoss()(projected, targets, attention)
    """

    student_shapes: Sequence[int | Sequence[int]]
    teacher_shapes: Sequence[int | Sequence[int]]
    batch_size: int
    _: KW_ONLY
    temperature: float = 1.0
    allocation: Allocation = "attention"
    mlp: bool = True
    similarity: bool = True
    projection: bool = True
    backend: Backend = "auto"
    group: Group = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = not self.similarity
        self.student_shapes = self._students = _shapes("student_shapes", self.student_shapes, whole=whole)
        self.teacher_shapes = self._teachers = _shapes("teacher_shapes", self.teacher_shapes, whole=whole)
        batch_size, similarity = self.batch_size, self.similarity

        def embeddings(shapes: list[tuple[int, ...]], mlp: bool) -> nn.ModuleList:
            outputs = max(batch_size // 4, 1)
            return nn.ModuleList(_Embedding(batch_size if similarity else prod(s), outputs, mlp) for s in shapes)

        if self.allocation != "equal":
            self.keys = embeddings(self._teachers, self.mlp)
            self.queries = embeddings(self._students, self.mlp)
        if self.projection:
            self.projections = nn.ModuleList(
                nn.ModuleList(new_projection(student[0], teacher[0]) for teacher in self._teachers)
                for student in self._students
            )
        else:
            self.teacher_values = embeddings(self._teachers, True)
            self.student_values = embeddings(self._students, True)

    def check(self) -> None:
        super().check()
        checks.positive_int("batch_size", self.batch_size)
        checks.positive("temperature", self.temperature)
        checks.one_of("allocation", self.allocation, ALLOCATIONS)
        if self.group is not None and self.allocation == "shared":
            raise ValueError("group must be None for allocation='shared', because it averages one process's samples")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Calibration:
        """Return the projected features, the targets and the attention.

        Args:
            student: the b x c x h x w features of each student layer, float32, float64, bfloat16 or float16, any
                strides.
            teacher: the features of each teacher layer. They receive a gradient, through the attention and as targets,
                only if they require one.

        Returns:
            A ``Calibration``, which ``SemCKDLoss`` takes.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape does not fit, or if ``student`` has more samples than ``batch_size``.
        """
        self.check()
        student, teacher = self._check(student, teacher)
        rows = self._rows(student, teacher) if self.allocation != "equal" or not self.projection else []
        of_student, of_teacher = rows[: len(student)], rows[len(student) :]
        attention = self._attention(of_student, of_teacher, student[0])
        if self.projection:
            rows_of_projections: Iterable[Any] = self.projections
            projected = [
                project(layer, row, teacher, self.backend)
                for layer, row in zip(student, rows_of_projections, strict=True)
            ]
            targets = [list(teacher) for _ in student]
        else:
            values = _embedded(self.student_values, of_student)
            projected = [[value[:, :, None, None] for _ in teacher] for value in values.unbind(1)]
            values = _embedded(self.teacher_values, of_teacher)
            targets = [[value[:, :, None, None] for value in values.unbind(1)] for _ in student]
        return Calibration(projected, targets, attention)

    def _check(self, student: object, teacher: object) -> tuple[list[Tensor], list[Tensor]]:
        students = _layers("student", student, self._students, whole=not self.similarity)
        teachers = _layers("teacher", teacher, self._teachers, whole=not self.similarity)
        for name, layers in (("student", students), ("teacher", teachers)):
            for index, layer in enumerate(layers):
                checks.same_batch(f"{name}[{index}]", layer, "student[0]", students[0])
                checks.same_device(f"{name}[{index}]", layer, "student[0]", students[0])
        if groups.resolve(self.group) is None:  # or all processes learn together whether there are too many
            self._check_batch(students[0].shape[0])
        return students, teachers

    def _check_batch(self, samples: int) -> None:
        if samples > self.batch_size:
            raise ValueError(f"student must have at most batch_size={self.batch_size} samples, got {samples}")

    def _rows(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Return what the MLPs read of each sample, layer by layer (Eq. 8)."""
        features = [*student, *teacher]
        if not self.similarity:
            return [layer.flatten(1).to(accumulation_dtype(*features)) for layer in features]
        matrices = functional.similarity_matrices(features, backend=self.backend, group=self.group)
        self._check_batch(matrices.shape[2])
        return list(F.pad(matrices, (0, self.batch_size - matrices.shape[2])).unbind())

    def _attention(self, of_student: list[Tensor], of_teacher: list[Tensor], like: Tensor) -> Tensor:
        shape = (like.shape[0], len(self._students), len(self._teachers))
        if self.allocation == "equal":
            return like.new_full(shape, 1 / shape[2], dtype=accumulation_dtype(like))
        with torch.autocast(like.device.type, enabled=False):
            scores = _embedded(self.queries, of_student) @ _embedded(self.keys, of_teacher).transpose(1, 2)
            attention = (scores / self.temperature).softmax(-1)
            return attention if self.allocation == "attention" else attention.mean(0).expand(shape)


@dataclass(eq=False, repr=False)
class SemCKDLoss(SettingsModule):
    """Hold the settings of ``kdkernels.cross_layer_mse`` (SemCKD Eq. 7).

    Call it with the results of ``SemanticCalibration``, and a mask of the samples that count if some do not. It returns
    a scalar. The published β = 400 belongs to the
    default reduction.

    Examples:
        >>> import torch
        >>> from kdkernels.nn import SemCKDLoss
        >>> projected, targets = [[torch.randn(8, 16, 4, 4)]], [[torch.randn(8, 16, 4, 4)]]
        >>> SemCKDLoss()(projected, targets, torch.ones(8, 1, 1)).shape
        torch.Size([])
    """

    _: KW_ONLY
    reduction: Reduction = "mean"
    backend: Backend = "auto"
    group: Group = None

    def check(self) -> None:
        super().check()
        feature_mse.check_settings(self.reduction)

    def forward(
        self,
        projected: Sequence[Sequence[Tensor]],
        targets: Sequence[Sequence[Tensor]],
        attention: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        return functional.cross_layer_mse(projected, targets, attention, mask=mask, **self.settings)


class _Embedding(nn.Module):
    """Linear-ReLU-Linear, then division of each row by its norm (Eq. 9). Without ``mlp`` it is one linear map."""

    def __init__(self, inputs: int, outputs: int, mlp: bool) -> None:
        super().__init__()
        widths = (inputs, 2 * outputs, outputs) if mlp else (inputs, outputs)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, rows: Tensor) -> Tensor:
        linears: Iterable[Any] = self.linears
        first, *more = linears
        rows = _linear(rows, first)
        for linear in more:
            rows = unit(_linear(rows.relu(), linear))
        return rows


def _embedded(embeddings: nn.ModuleList, rows: list[Tensor]) -> Tensor:
    """Return the embeddings of all layers, b x L x e."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return torch.stack([embedding(row) for embedding, row in zip(embeddings, rows, strict=True)], 1)


def _linear(rows: Tensor, linear: nn.Linear) -> Tensor:
    """Apply a linear map in the precision of the rows: in half precision, similarities would overflow."""
    if not bare(linear):  # its weight may be elsewhere until it is called
        result: Tensor = linear(rows.to(linear.weight.dtype))
        return result.to(rows.dtype)
    return F.linear(rows, linear.weight.to(rows.dtype), linear.bias.to(rows.dtype))


def unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    dead = norms == 0
    return torch.where(dead, 0.0, rows / torch.where(dead, 1.0, norms))


def new_projection(inputs: int, outputs: int) -> nn.Sequential:
    inner = 2 * outputs
    return nn.Sequential(
        nn.Conv2d(inputs, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, outputs, 1, bias=False),
    )


def project(
    features: Tensor,
    projections: Sequence[nn.Module] | nn.ModuleList,
    teacher: Sequence[Tensor],
    backend: Backend = "auto",
) -> list[Tensor]:
    """Return one student layer projected for every teacher layer, each by its own projection (Eq. 6)."""
    if features.element_size() == 2 and not torch.is_autocast_enabled(features.device.type):
        features = features.to(next(next(iter(projections)).parameters()).dtype)
    sizes = [smaller_size(features, target) for target in teacher]
    if torch.compiler.is_compiling() or backends.transformed():
        # Neither follows memory formats, and the sizes in a compiled program may be symbols, which have no hash.
        maps = [averaged(features, size) for size in sizes]
        return [_project(projection, one, backend) for projection, one in zip(projections, maps, strict=True)]
    # On a CPU, convolutions are a sixth faster with channels last; the loss is, with maps in their targets' order.
    turned = features.device.type == "cpu" and features.is_contiguous()
    pooled = {size: averaged(features, size) for size in sizes}
    if turned:
        pooled = {size: maps.contiguous(memory_format=torch.channels_last) for size, maps in pooled.items()}
    projected = [
        _project(projection, pooled[size], backend) for projection, size in zip(projections, sizes, strict=True)
    ]
    return [maps.contiguous() for maps in projected] if turned else projected


_PLAIN = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class says."""
    patched = "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook()
    return bool(patched) or any(getattr(module, hooks) for hooks in _HOOKS)


def bare(module: nn.Module) -> bool:
    """Return whether calling a module and computing with its parameters are the same: nothing is wrapped or hooked.

    FSDP and parametrisations change the classes of modules.
    """
    return all(type(part) in _PLAIN and not hooked(part) for part in module.modules())


def _project(projection: nn.Module, features: Tensor, backend: Backend) -> Tensor:
    """Return ``projection(features)``. In training, keep half as much for the backward pass."""
    if not _can_keep_less(projection, features, backend):
        projected: Tensor = projection(features)
        return projected
    layers: list[Any] = list(projection.children())
    first, *rest = layers
    features = first(features)
    for norm, _, conv in zip(*[iter(rest)] * 3, strict=True):
        features = _NormConv.apply(features, norm, norm.weight, norm.bias, conv.weight, backend)
        norm.num_batches_tracked.add_(1)
    return features


def _can_keep_less(projection: nn.Module, features: Tensor, backend: Backend) -> bool:
    if torch.compiler.is_compiling() or backends.transformed() or not torch.is_grad_enabled():
        return False
    if backends.requested(backend) == "reference":  # which has second derivatives
        return False
    single = features[:, 0].numel() == 1  # which has no variance, as the layers say
    if single or not bare(projection):
        return False
    return all(type(layer) is nn.BatchNorm2d and layer.training for layer in list(projection.children())[1::3])


class _NormConv(torch.autograd.Function):
    """Batch normalisation in training, ReLU and convolution. The backward pass computes the ReLU's output again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, scale: Tensor, shift: Tensor, weight: Tensor, backend: Backend
    ) -> Tensor:
        running = norm.running_mean, norm.running_var
        normal, mean, inverse = torch.native_batch_norm(x, scale, shift, *running, True, norm.momentum, norm.eps)
        weight = weight.to(x.dtype)  # under autocast
        ctx.save_for_backward(x, scale, shift, weight, mean, inverse)
        ctx.eps, ctx.backend = norm.eps, backend
        return convolution(normal.relu_(), weight, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _NormConv._gradients(ctx, grad)
        x, scale, shift, weight, *_ = ctx.saved_tensors
        return tuple(g if g is None else differentiable_once(g, grad, x, scale, shift, weight) for g in gradients)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, mean, inverse = ctx.saved_tensors
        aten, eps = torch.ops.aten, ctx.eps
        of_x, _, of_scale, of_shift, of_weight, _ = ctx.needs_input_grad
        variance = inverse.square().reciprocal() - eps
        rectified = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0].relu_()
        wanted = of_x or of_scale or of_shift, of_weight
        of_rectified, weight_grad = convolution_backward(grad, rectified, weight, wanted, backend=ctx.backend)
        if of_rectified is None:
            return None, None, None, None, weight_grad, None
        of_normal = aten.threshold_backward(of_rectified, rectified, 0)
        x_grad, *norm_grads = aten.native_batch_norm_backward(
            of_normal, x, scale, None, None, mean, inverse, True, eps, [of_x, of_scale, of_shift]
        )
        return x_grad, None, *norm_grads, weight_grad, None


def averaged(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Average down to ``size``. Pooling with equal windows has a gradient that repeats bit by bit on every device."""
    height, width = features.shape[2:]
    if (height, width) == size:
        return features
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(features, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(features, size)


def _shapes(name: str, shapes: Sequence[int | Sequence[int]], *, whole: bool) -> list[tuple[int, ...]]:
    """Return the shape of each layer, or only its channels, as a tuple."""
    if not isinstance(shapes, Sequence):
        raise TypeError(f"{name} must be a sequence with an entry for each layer, got {type(shapes).__name__}")
    tuples = [tuple(shape) if isinstance(shape, Sequence) else (shape,) for shape in shapes]
    lengths, what = ((3,), "c x h x w") if whole else ((1, 3), "channels or c x h x w")
    if not tuples or any(len(shape) not in lengths for shape in tuples):
        raise ValueError(f"{name} must have {what} of at least one layer, got {shapes!r}")
    return [tuple(checks.positive_int(f"a size in {name}", size) for size in shape) for shape in tuples]


def _layers(name: str, features: object, shapes: list[tuple[int, ...]], *, whole: bool) -> list[Tensor]:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name} must be a sequence of maps, one per layer, got {type(features).__name__}")
    if len(features) != len(shapes):
        raise ValueError(f"{name} must hold {len(shapes)} layers, got {len(features)}")
    for index, (layer, shape) in enumerate(zip(features, shapes, strict=True)):
        checks.tensor(f"{name}[{index}]", layer, 4, "b x c x h x w")
        if layer.shape[1] != shape[0]:
            raise ValueError(f"{name}[{index}] must have {shape[0]} channels, got {layer.shape[1]}")
        if whole and layer.shape[1:] != shape:
            raise ValueError(f"{name}[{index}] must have shape b x {shape}, got {tuple(layer.shape)}")
    return list(features)
