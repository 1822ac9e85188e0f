"""Semantic calibration (SemCKD): which teacher layers a student layer learns from, and its loss."""

# Annotations are not put off here: those of a NamedTuple would stay names, which pdoc looks up in the wrong module.
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, checks, functional
from ..native import accumulation_dtype
from ..ops.autograd import once
from ..ops.convolution import convolution, convolution_backward

__all__ = ["Calibration", "SemCKDLoss", "SemanticCalibration"]

ALLOCATIONS = ("attention", "equal", "shared")


class Calibration(NamedTuple):
    """What ``SemCKDLoss`` takes, in its order; of student layer i and teacher layer j.

    Attributes:
        projected: projected[i][j], b x c_j x h x w, the student's features brought to the teacher's channels.
        targets: targets[i][j], b x c_j x h' x w', the teacher's features as they came.
        attention: b x s_L x t_L, how much each sample's layer i is to learn from layer j; over j it sums to 1.
    """

    projected: list[list[Tensor]]
    targets: list[list[Tensor]]
    attention: Tensor


class SemanticCalibration(nn.Module):
    """The learned association of layers and the projections of SemCKD (Eqs. 4-10, 16).

    ``α = softmax_j(Q_i · K_j / τ)`` per sample, where queries Q_i of the student's and keys K_j of the teacher's layers
    come from the rows of their similarity matrices by an MLP per layer: Linear(B, 2e) - ReLU - Linear(2e, e), divided
    by the L2 norm, with e = B / 4 for batches of B. Each student layer is projected to the channels of each teacher
    layer by 1x1 - BN - ReLU - 3x3 - BN - ReLU - 1x1 convolutions of twice those channels, without biases; where its map
    is the larger, it is averaged down first, and where the teacher's is, the loss does that. Train the module with the
    student: give its parameters to the optimiser, as in

        calibration = SemanticCalibration((128, 256, 512, 512), (64, 128, 256), batch_size=64)
        loss = cross_entropy + kd + 400 * SemCKDLoss()(*calibration(student_maps, teacher_maps))

    Args:
        student_shapes: channels of each student layer, or its shape without the batch, c x h x w.
        teacher_shapes: the same of the teacher.
        batch_size: B, the width of the MLPs. A smaller batch has its similarity rows filled up with zeros.
        temperature: τ > 0; 1 is SemCKD, 2 or 4 its softened variant SemCKD_τ.
        allocation: "attention" is the paper's; in Table 6 stand against it "equal", α = 1 / t_L, and "shared", the same
            for all samples: the mean of their α (the w of Eq. 11).
        mlp: False puts one linear map without normalisation in place of each MLP (Table 6, "w/o MLP").
        similarity: False feeds the MLPs the features themselves, which fixes their size, so that both shapes must be
            c x h x w (Table 6, "w/o Similarity Matrices").
        projection: False compares MLP embeddings of the similarity rows, e numbers per layer, in place of feature maps
            (Table 6, "w/o Projection").
        backend: what computes the similarity matrices, "auto", "reference", "native" or "triton". On a CPU, "native"
            holds for the 3x3 convolutions, too, in training and if their channels are a multiple of 32.
        group: a torch.distributed process group over which the batch is spread: samples are compared with those of all
            processes, whose number together ``batch_size`` bounds. Give it to ``SemCKDLoss`` as well, and convert the
            module by ``SyncBatchNorm.convert_sync_batchnorm`` to have the projections' statistics of the whole batch.

    Queries, keys and attention are computed in float32 (float64 for float64 features) whatever the module's dtype and
    under autocast, for similarities overflow in half precision.

    With the parameters of the authors' ``SelfA``, which lie in the same order (keys, queries, projections), attention
    and projected maps are theirs. Two departures: a query or key of norm 0 is the zero vector, which attends to all
    layers alike, where theirs is NaN; and they skip batches smaller than B.

    Memory: (s_L + t_L)·b² similarities; for each pair of layers the projection keeps two maps of 2·c_j channels, since
    what the normalisations give is computed again in the backward pass, which raises if it is differentiated itself.
    With backend="reference" it is kept, and second derivatives work.
    """

    def __init__(
        self,
        student_shapes: Sequence[int | Sequence[int]],
        teacher_shapes: Sequence[int | Sequence[int]],
        batch_size: int,
        *,
        temperature: float = 1.0,
        allocation: str = "attention",
        mlp: bool = True,
        similarity: bool = True,
        projection: bool = True,
        backend: str = "auto",
        group: object | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("batch_size", batch_size)
        checks.positive("temperature", temperature)
        checks.one_of("allocation", allocation, ALLOCATIONS)
        if group is not None and allocation == "shared":
            raise ValueError("group must be None for allocation='shared', whose mean is that of one process's samples")
        self.student_shapes = _shapes("student_shapes", student_shapes, whole=not similarity)
        self.teacher_shapes = _shapes("teacher_shapes", teacher_shapes, whole=not similarity)
        self.batch_size = batch_size
        self.temperature = temperature
        self.allocation = allocation
        self.mlp = mlp
        self.similarity = similarity
        self.projection = projection
        self.backend = backend
        self.group = group

        def embeddings(shapes: list[tuple[int, ...]], mlp: bool) -> nn.ModuleList:
            outputs = max(batch_size // 4, 1)
            return nn.ModuleList(_Embedding(batch_size if similarity else prod(s), outputs, mlp) for s in shapes)

        if allocation != "equal":
            self.keys = embeddings(self.teacher_shapes, mlp)
            self.queries = embeddings(self.student_shapes, mlp)
        if projection:
            self.projections = nn.ModuleList(
                nn.ModuleList(new_projection(student[0], teacher[0]) for teacher in self.teacher_shapes)
                for student in self.student_shapes
            )
        else:
            self.teacher_values = embeddings(self.teacher_shapes, True)
            self.student_values = embeddings(self.student_shapes, True)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Calibration:
        """Project and associate.

        Args:
            student: b x c x h x w features of each student layer, float32, float64, bfloat16 or float16, any strides.
            teacher: the same of the teacher. They receive a gradient, through the attention and as targets, only if
                they require one.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what it got; ``student`` with more samples
                than ``batch_size`` among them.
        """
        student, teacher = self._check(student, teacher)
        rows = self._rows(student, teacher) if self.allocation != "equal" or not self.projection else []
        of_student, of_teacher = rows[: len(student)], rows[len(student) :]
        attention = self._attention(of_student, of_teacher, student[0])
        if self.projection:
            projected = [
                project(layer, row, teacher, self.backend) for layer, row in zip(student, self.projections, strict=True)
            ]
            targets = [list(teacher) for _ in student]
        else:
            values = _embedded(self.student_values, of_student)
            projected = [[value[:, :, None, None] for _ in teacher] for value in values.unbind(1)]
            values = _embedded(self.teacher_values, of_teacher)
            targets = [[value[:, :, None, None] for value in values.unbind(1)] for _ in student]
        return Calibration(projected, targets, attention)

    def extra_repr(self) -> str:
        return (
            f"batch_size={self.batch_size}, temperature={self.temperature}, allocation={self.allocation!r}, "
            f"mlp={self.mlp}, similarity={self.similarity}, projection={self.projection}"
        )

    def _check(self, student: object, teacher: object) -> tuple[list[Tensor], list[Tensor]]:
        student = _layers("student", student, self.student_shapes, whole=not self.similarity)
        teacher = _layers("teacher", teacher, self.teacher_shapes, whole=not self.similarity)
        for name, layers in (("student", student), ("teacher", teacher)):
            for index, layer in enumerate(layers):
                checks.same_batch(f"{name}[{index}]", layer, "student[0]", student[0])
                checks.same_device(f"{name}[{index}]", layer, "student[0]", student[0])
        if self.group is None:  # or all processes learn together whether there are too many
            self._check_batch(student[0].shape[0])
        return student, teacher

    def _check_batch(self, samples: int) -> None:
        if samples > self.batch_size:
            raise ValueError(f"student must have at most batch_size={self.batch_size} samples, got {samples}")

    def _rows(self, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
        """What is embedded of each sample, layer by layer (Eq. 8)."""
        features = [*student, *teacher]
        if not self.similarity:
            return [layer.flatten(1).to(accumulation_dtype(*features)) for layer in features]
        matrices = functional.similarity_matrices(features, backend=self.backend, group=self.group)
        self._check_batch(matrices.shape[2])
        return list(F.pad(matrices, (0, self.batch_size - matrices.shape[2])).unbind())

    def _attention(self, of_student: list[Tensor], of_teacher: list[Tensor], like: Tensor) -> Tensor:
        shape = (like.shape[0], len(self.student_shapes), len(self.teacher_shapes))
        if self.allocation == "equal":
            return like.new_full(shape, 1 / shape[2], dtype=accumulation_dtype(like))
        with torch.autocast(like.device.type, enabled=False):
            scores = _embedded(self.queries, of_student) @ _embedded(self.keys, of_teacher).transpose(1, 2)
            attention = (scores / self.temperature).softmax(-1)
            return attention if self.allocation == "attention" else attention.mean(0).expand(shape)


class SemCKDLoss(nn.Module):
    """Cross-layer distillation (SemCKD Eq. 7); see ``kdkernels.cross_layer_mse`` for the settings.

    ``SemCKDLoss()(*calibration(student, teacher))``; β = 400 belongs to the default reduction.
    """

    def __init__(self, *, reduction: str = "mean", backend: str = "auto", group: object | None = None) -> None:
        super().__init__()
        self.reduction = reduction
        self.backend = backend
        self.group = group

    def forward(
        self, projected: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], attention: Tensor
    ) -> Tensor:
        return functional.cross_layer_mse(
            projected, targets, attention, reduction=self.reduction, backend=self.backend, group=self.group
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class _Embedding(nn.Module):
    """Linear-ReLU-Linear, then each row divided by its norm (Eq. 9); without ``mlp`` one linear map."""

    def __init__(self, inputs: int, outputs: int, mlp: bool) -> None:
        super().__init__()
        widths = (inputs, 2 * outputs, outputs) if mlp else (inputs, outputs)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, rows: Tensor) -> Tensor:
        first, *more = self.linears
        rows = _linear(rows, first)
        for linear in more:
            rows = _unit(_linear(rows.relu(), linear))
        return rows


def _embedded(embeddings: nn.ModuleList, rows: list[Tensor]) -> Tensor:
    """b x L x e."""
    with torch.autocast(rows[0].device.type, enabled=False):
        return torch.stack([embedding(row) for embedding, row in zip(embeddings, rows, strict=True)], 1)


def _linear(rows: Tensor, linear: nn.Linear) -> Tensor:
    """In the rows' precision: similarities of a module in half precision would overflow."""
    return F.linear(rows, linear.weight.to(rows.dtype), linear.bias.to(rows.dtype))


def _unit(rows: Tensor) -> Tensor:
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
    features: Tensor, projections: Sequence[nn.Sequential], teacher: Sequence[Tensor], backend: str = "auto"
) -> list[Tensor]:
    """One student layer for every teacher layer (Eq. 6), each by its own projection."""
    if features.element_size() == 2 and not torch.is_autocast_enabled(features.device.type):
        features = features.to(projections[0][0].weight.dtype)
    sizes = [tuple(map(min, features.shape[2:], target.shape[2:])) for target in teacher]
    # On a CPU, convolutions are a sixth faster with channels last; the loss is, with maps in their targets' order.
    traced = torch.compiler.is_compiling() or backends.transformed()  # neither follows memory formats
    turned = features.device.type == "cpu" and features.is_contiguous() and not traced
    pooled = {size: _averaged(features, size) for size in sizes}
    if turned:
        pooled = {size: maps.contiguous(memory_format=torch.channels_last) for size, maps in pooled.items()}
    projected = [
        _project(projection, pooled[size], backend) for projection, size in zip(projections, sizes, strict=True)
    ]
    return [maps.contiguous() for maps in projected] if turned else projected


def _project(projection: nn.Sequential, features: Tensor, backend: str) -> Tensor:
    """``projection(features)``, which in training keeps half as much for the backward pass."""
    first, *rest = projection
    plain = torch.compiler.is_compiling() or backends.transformed() or not torch.is_grad_enabled()
    plain = plain or backends.asked(backend) == "reference"  # which has second derivatives
    single = features[:, 0].numel() == 1  # which has no variance, as the layers say
    if plain or single or not all(type(layer) is nn.BatchNorm2d and layer.training for layer in rest[::3]):
        return projection(features)
    features = first(features)
    for norm, _, conv in zip(*[iter(rest)] * 3, strict=True):
        features = _NormConv.apply(features, norm, norm.weight, norm.bias, conv.weight, backend)
        norm.num_batches_tracked.add_(1)
    return features


class _NormConv(torch.autograd.Function):
    """Batch normalisation in training, ReLU and convolution, whose input is not kept but computed again."""

    @staticmethod
    def forward(ctx, x, norm, scale, shift, weight, backend):
        running = norm.running_mean, norm.running_var
        normal, mean, inverse = torch.native_batch_norm(x, scale, shift, *running, True, norm.momentum, norm.eps)
        weight = weight.to(x.dtype)  # under autocast
        ctx.save_for_backward(x, scale, shift, weight, mean, inverse)
        ctx.eps, ctx.backend = norm.eps, backend
        return convolution(normal.relu_(), weight, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            gradients = _NormConv._gradients(ctx, grad)
        x, scale, shift, weight, *_ = ctx.saved_tensors
        return tuple(g if g is None else once(g, grad, x, scale, shift, weight) for g in gradients)

    @staticmethod
    def _gradients(ctx, grad):
        x, scale, shift, weight, mean, inverse = ctx.saved_tensors
        aten, eps = torch.ops.aten, ctx.eps
        of_x, _, of_scale, of_shift, of_weight, _ = ctx.needs_input_grad
        variance = inverse.square().reciprocal() - eps
        rectified = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0].relu_()
        wanted = of_x or of_scale or of_shift, of_weight
        grad, weight_grad = convolution_backward(grad, rectified, weight, wanted, backend=ctx.backend)
        if grad is None:
            return None, None, None, None, weight_grad, None
        grad = aten.threshold_backward(grad, rectified, 0)
        wanted = [of_x, of_scale, of_shift]
        x_grad, *norm_grads = aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, inverse, True, eps, wanted
        )
        return x_grad, None, *norm_grads, weight_grad, None


def _averaged(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Averaged down to ``size``. Pooling with equal windows has a gradient that repeats bitwise on every device."""
    height, width = features.shape[2:]
    if (height, width) == size:
        return features
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(features, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(features, size)


def _shapes(name: str, shapes: Sequence[int | Sequence[int]], *, whole: bool) -> list[tuple[int, ...]]:
    """Each layer's shape, or its channels alone, as a tuple."""
    if not isinstance(shapes, Sequence):
        raise TypeError(f"{name} must be a sequence with an entry for each layer, got {type(shapes).__name__}")
    tuples = [(shape,) if isinstance(shape, int) else tuple(shape) for shape in shapes]
    lengths, what = ((3,), "c x h x w") if whole else ((1, 3), "channels or c x h x w")
    if not tuples or any(len(shape) not in lengths for shape in tuples):
        raise ValueError(f"{name} must have {what} of at least one layer, got {shapes!r}")
    for size in {size for shape in tuples for size in shape}:
        checks.positive_int(f"a size in {name}", size)
    return tuples


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
