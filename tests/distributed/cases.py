"""torchrun runs this with any number of processes. Every loss over all ranks is compared with one process on the whole
batch.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kdkernels
from kdkernels import distributed
from kdkernels.ops.icc import distributed as icc_over_ranks

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[..., None], *arguments: object, **settings: object) -> None:
    name = " ".join([function.__name__, *map(str, arguments), *map(str, settings.values())])
    CASES[name] = functools.partial(function, *arguments, **settings)


def shares(count: int = 11) -> list[int]:
    """Return uneven shares of a batch. The last rank has the smallest."""
    world = dist.get_world_size()
    return [count // world + (rank < count % world) + (rank == 0) - (rank == world - 1) for rank in range(world)]


def whole_batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(shares()), *shape, dtype=dtype)


def own(batch: Tensor) -> Tensor:
    """Return this rank's samples."""
    return batch.detach().split(shares())[dist.get_rank()]


def agree(loss: Callable[..., Tensor], *batches: Tensor, exactly: Callable[..., Tensor] | None = None) -> None:
    """Assert that loss and gradients with ``group`` equal those of the whole batch in float64."""
    leaves = [own(batch).clone().requires_grad_(batch.requires_grad) for batch in batches]
    value = loss(*leaves, group=dist.group.WORLD)
    value.backward()
    whole = [batch.detach().double().requires_grad_(batch.requires_grad) for batch in batches]
    expected = (exactly or loss)(*whole)
    expected.backward()
    assert_close(value, expected.detach(), "loss")
    for leaf, batch in zip(leaves, whole, strict=True):
        if batch.grad is None:
            assert leaf.grad is None
        else:
            assert leaf.grad.dtype == leaf.dtype
            # DistributedDataParallel averages over the ranks. Errors are relative to the norm of the whole gradient.
            gradient = batch.grad.to(leaf.dtype)
            own(gradient).copy_(leaf.grad / dist.get_world_size())
            assert_close(gradient, batch.grad, "gradient")
    everyone = [torch.empty_like(value.detach()) for _ in shares()]
    dist.all_gather(everyone, value.detach())
    assert all(torch.equal(value, other) for other in everyone), "loss differs between ranks"


def local_correlation(form: str, dtype: torch.dtype, teacher_learns: bool = True, **settings: object) -> None:
    student = [whole_batch(3, 4, 4, dtype=dtype), whole_batch(2, 4, 6, dtype=dtype)]
    teacher = [whole_batch(5, 2, 6, dtype=dtype), whole_batch(3, 4, 2, dtype=dtype)]
    masks = [torch.rand(len(maps), 1, *maps.shape[2:]) for maps in teacher]
    masked = {"threshold": 0.3} if settings.pop("masked", False) else None

    def loss(*maps: Tensor, group: object = None) -> Tensor:
        if masked:
            settings["mask"] = [own(mask) if group else mask for mask in masks]
        return kdkernels.local_correlation_loss(
            maps[:2], maps[2:], 2, form=form, group=group, **settings, **(masked or {})
        )

    agree(loss, *(x.requires_grad_() for x in student), *(x.requires_grad_(teacher_learns) for x in teacher))


def congruence(dtype: torch.dtype, **settings: object) -> None:
    loss = functools.partial(kdkernels.correlation_congruence_loss, **settings)
    agree(loss, whole_batch(7, dtype=dtype).requires_grad_(), whole_batch(4, dtype=dtype).requires_grad_())


def similarity(form: str, dtype: torch.dtype, learns: tuple[bool, bool] = (True, True), **settings: str) -> None:
    batches = (whole_batch(7, dtype=dtype), whole_batch(3, 2, dtype=dtype))
    batches[0][0] = 0
    loss = functools.partial(kdkernels.similarity_preserving_loss, form=form, **settings)
    agree(loss, *(batch.requires_grad_(learn) for batch, learn in zip(batches, learns, strict=True)))


def tokens(dtype: torch.dtype, masked: bool = False, **settings: object) -> None:
    """Queries and keys of two networks; or one input, some of whose tokens are masked."""
    student, teacher = whole_batch(5, 4, dtype=dtype), whole_batch(6, 1, 5, dtype=dtype)
    mask = torch.rand(len(student), 5) < 0.7

    def loss(*inputs: Tensor, group: object = None) -> Tensor:
        pair = inputs if masked else ((inputs[0], inputs[0].flip(1)), (inputs[1], inputs[1].flip(3)))
        given = {"mask": own(mask) if group else mask} if masked else {}
        return kdkernels.token_relation_loss(*pair, group=group, **given, **settings)

    agree(loss, student.requires_grad_(), teacher.requires_grad_())


def tokens_by_channels(dtype: torch.dtype, masked: bool = False, **settings: object) -> None:
    """Channels of the tokens of all ranks, related with one another."""
    mask = torch.rand(sum(shares()), 5) < 0.7

    def loss(*inputs: Tensor, group: object = None) -> Tensor:
        given = {"mask": own(mask) if group else mask} if masked else {}
        return kdkernels.token_relation_loss(
            *inputs, axis="channels", across="batch", heads=2, group=group, **given, **settings
        )

    agree(loss, *(whole_batch(5, 6, dtype=dtype).requires_grad_() for _ in range(2)))


def contrastive(dtype: torch.dtype, **settings: object) -> None:
    """Also scales that learn: they are parameters, whose gradients are averaged over the ranks."""
    scales = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (3.0, 2.0)]
    whole_scales = [x.detach().double().requires_grad_() for x in scales]

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor, group: object = None) -> Tensor:
        student, teacher = scales if group else whole_scales
        given = {"student_scale": student, "teacher_scale": teacher}
        return kdkernels.contrastive_relation_loss(a, b, c, d, group=group, **given, **settings)

    agree(loss, *(whole_batch(width, dtype=dtype).requires_grad_() for width in (4, 4, 5, 5)))
    for scale, whole in zip(scales, whole_scales, strict=True):
        dist.all_reduce(scale.grad)
        if dtype == torch.float64:  # terms of both signs may cancel
            torch.testing.assert_close(scale.grad / dist.get_world_size(), whole.grad, rtol=1e-9, atol=1e-9)


def foreign_blocks() -> None:
    """At most two blocks of other ranks are in memory at a time."""
    arriving, most = [], 0
    transfer = dist.P2POp

    def watched(op: Callable, tensor: Tensor, **settings: object) -> object:
        nonlocal most
        if op is dist.irecv:
            arriving.append(weakref.ref(tensor))
            held = [block for reference in arriving if (block := reference()) is not None]
            most = max(most, len({block.untyped_storage().data_ptr() for block in held}))
        return transfer(op, tensor, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "P2POp", watched)
        contrastive(torch.float64)
    assert len(arriving) >= 6 * (dist.get_world_size() - 1), "no ring"
    assert most <= 2


def inter_class(dtype: torch.dtype, scale: float = 1.0, **settings: object) -> None:
    loss = functools.partial(kdkernels.inter_class_correlation_loss, **settings)
    agree(loss, *((scale * whole_batch(6, dtype=dtype)).requires_grad_() for _ in range(2)))


def correlations(dtype: torch.dtype) -> None:
    loss = functools.partial(kdkernels.dist_loss, gamma=2.0, temperature=2.0)
    agree(loss, *((2 * whole_batch(6, dtype=dtype)).requires_grad_() for _ in range(2)))


def inter_class_of_many_classes() -> None:
    """Only some rows of the maps are held at a time, because the limit is set to four entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icc_over_ranks, "HELD", 4)
        inter_class(torch.float32)


def embeddings(dtype: torch.dtype, loss: Callable[..., Tensor], learns: tuple[bool, bool]) -> None:
    batches = (whole_batch(7, dtype=dtype), whole_batch(4, dtype=dtype))
    agree(loss, *(batch.requires_grad_(learn) for batch, learn in zip(batches, learns, strict=True)))


def cross_layer(dtype: torch.dtype, reduction: str) -> None:
    def loss(a: Tensor, b: Tensor, t: Tensor, weights: Tensor, group: object = None) -> Tensor:
        return kdkernels.cross_layer_mse([[a], [b]], [[t], [t]], weights, reduction=reduction, group=group)

    maps = (whole_batch(3, 4, 4, dtype=dtype), whole_batch(3, 2, 2, dtype=dtype), whole_batch(3, 4, 2, dtype=dtype))
    # Attention is never negative. With both signs, the weighted errors might nearly cancel.
    weights = whole_batch(2, 1, dtype=dtype).abs()
    agree(loss, *(x.requires_grad_() for x in maps), weights.requires_grad_())


def masked(function: str, dtype: torch.dtype, *shape: int, **settings: object) -> None:
    """Check that the padding, which may be all samples of a rank, is left out."""
    for empty in (False, True):
        mask = torch.rand(sum(shares())) < 0.6
        mask[:2] = True
        if empty:
            mask[shares()[0] :] = False

        def loss(student: Tensor, teacher: Tensor, group: object = None, mask: Tensor = mask) -> Tensor:
            mine = own(mask) if group else mask
            student, teacher = (x.masked_fill(~mine.view(-1, *[1] * len(shape)), torch.nan) for x in (student, teacher))
            return getattr(kdkernels, function)(student, teacher, mask=mine, group=group, **settings)

        agree(
            loss, whole_batch(*shape, dtype=dtype).requires_grad_(), whole_batch(*shape, dtype=dtype).requires_grad_()
        )


def masked_inter_class(dtype: torch.dtype, **settings: object) -> None:
    """Also with classes that are not there, and with the logarithms of a few rows of the maps at a time."""
    class_mask = torch.tensor([True, False, True, True, False, True])
    for there in (None, class_mask):
        masked("inter_class_correlation_loss", dtype, 6, class_mask=there, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(icc_over_ranks, "HELD", 4)
            masked("inter_class_correlation_loss", dtype, 6, class_mask=there, **settings)


def masked_cross_layer(dtype: torch.dtype, reduction: str) -> None:
    maps, mask = [whole_batch(3, 2, 2, dtype=dtype) for _ in range(2)], torch.rand(sum(shares())) < 0.6
    mask[0] = True

    def loss(a: Tensor, t: Tensor, weights: Tensor, group: object = None) -> Tensor:
        settings = {"mask": own(mask) if group else mask, "reduction": reduction, "group": group}
        return kdkernels.cross_layer_mse([[a], [a]], [[t], [t]], weights, **settings)

    agree(loss, *(x.requires_grad_() for x in maps), whole_batch(2, 1, dtype=dtype).abs().requires_grad_())


def masked_matrices() -> None:
    rows, mask = whole_batch(5), torch.rand(sum(shares())) < 0.6
    matrices = kdkernels.similarity_matrices([own(rows)], mask=own(mask), group=dist.group.WORLD)
    assert_close(matrices[0], own(kdkernels.similarity_matrices([rows], mask=mask)[0]))


def calibration() -> None:
    """Check SemCKD as modules. Samples attend by their similarities to the samples of all ranks."""
    world = dist.group.WORLD
    parallel, alone = (
        kdkernels.nn.SemanticCalibration((3, 5), (4, 2), sum(shares()) + 2, group=group).double().eval()
        for group in (world, None)
    )
    alone.load_state_dict(parallel.state_dict())

    def loss(*maps: Tensor, group: object = None) -> Tensor:
        found = (parallel if group else alone)(maps[:2], maps[2:])
        return kdkernels.nn.SemCKDLoss(group=group)(*found)

    maps = ((3, 4, 4), (5, 2, 2), (4, 4, 2), (2, 2, 2))
    agree(loss, *(whole_batch(*shape).requires_grad_() for shape in maps))
    of_ranks = [parameter.grad for parameter in parallel.parameters()]
    for gradient in of_ranks:
        dist.all_reduce(gradient)
    flat, exact = (
        torch.cat([g.flatten() for g in found]) for found in (of_ranks, [p.grad for p in alone.parameters()])
    )
    assert_close(flat / dist.get_world_size(), exact, "gradient of the parameters")
    narrow = kdkernels.nn.SemanticCalibration((3,), (4,), max(shares()), group=world)
    if dist.get_world_size() > 1:
        few = [torch.randn(len(own(whole_batch(1))), channels, 2, 2) for channels in (3, 4)]
        raises(
            ValueError,
            f"at most batch_size={max(shares())} samples, got {sum(shares())}",
            lambda: narrow(few[:1], few[1:]),
        )


def contrast() -> None:
    """Check CRD, twice because the second call reads the memory that all ranks moved."""
    parallel, single = (
        kdkernels.nn.CRDLoss(4, 3, 16, embedding_width=5, negatives=8, group=group).double()
        for group in (dist.group.WORLD, None)
    )
    single.load_state_dict(parallel.state_dict())
    for _ in range(2):
        images, negatives = torch.randperm(16)[: sum(shares())], torch.randint(16, (sum(shares()), 8))
        numbers = {parallel: (own(images), own(negatives)), single: (images, negatives)}

        def loss(student: Tensor, teacher: Tensor, group: object = None, numbers: dict = numbers) -> Tensor:
            module = single if group is None else parallel
            return module(student, teacher, *numbers[module])

        agree(loss, *(whole_batch(width).requires_grad_() for width in (4, 3)))
    for name, buffer in parallel.named_buffers():
        assert_close(buffer, single.get_buffer(name), name)


def relations_of_samples() -> None:
    """Check IRG and HKD, with layers of several shapes."""

    def graph(*features: Tensor, group: object = None) -> Tensor:
        student, teacher, *layers = features
        settings = {"graph_weight": 2.0, "transformation_weight": 3.0}
        return kdkernels.nn.IRGLoss(**settings, group=group)(student, teacher, [layers[:2]], [layers[2:]])

    def flow(*features: Tensor, group: object = None) -> Tensor:
        return kdkernels.nn.HKDLoss(weights=(3.0, 0.5, 1.0), group=group)(features[:3], features[3:])

    for loss in (graph, flow):
        for dtype in (torch.float64, torch.float32):
            shapes = ((3,), (3,), (2, 2, 2), (2, 2, 2), (4,), (2, 3))
            agree(loss, *(whole_batch(*shape, dtype=dtype).requires_grad_() for shape in shapes))


def matching() -> None:
    """Check that all ranks assign MGD's channels by the costs of all images."""
    student, teacher = whole_batch(4, 3, 3), whole_batch(8, 3, 3)
    parallel, single = (kdkernels.nn.MGDLoss((4,), (8,), group=group) for group in (dist.group.WORLD, None))
    parallel.track([own(student)], [own(teacher)])
    single.track([student], [teacher])
    for mgd in (parallel, single):
        mgd.assign()
    assert torch.equal(parallel.assigned0, single.assigned0)


def similarities(dtype: torch.dtype) -> None:
    """Check the rows of the matrices on every rank, with a loss that depends only on the rank's own rows.

    Its terms have one sign, so that they do not cancel.
    """
    weight = whole_batch(2, sum(shares())).abs()

    def loss(*features: Tensor, group: object = None) -> Tensor:
        matrices = kdkernels.similarity_matrices(features, group=group)
        terms = (matrices.transpose(0, 1).square() * (own(weight) if group else weight).to(matrices)).sum()
        return distributed.sum_over(distributed.agree(group, 1, terms.device), terms) if group else terms

    agree(loss, whole_batch(3, 2, 2, dtype=dtype).requires_grad_(), whole_batch(5, dtype=dtype).requires_grad_())


def parallel_training(form: str) -> None:
    """A network under DistributedDataParallel learns the same as one process on the whole batch."""
    torch.manual_seed(7)
    teacher, student, alone = (nn.Conv2d(1, width, 3, padding=1).double() for width in (4, 3, 3))
    alone.load_state_dict(student.state_dict())
    images = whole_batch(1, 6, 6)
    parallel = DistributedDataParallel(student)

    def train(network: nn.Module, images: Tensor, group: object) -> None:
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        criterion = kdkernels.nn.LocalCorrelationLoss(3, reduction="mean", form=form, group=group)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(network(images), teacher(images).detach()).backward()
            optimizer.step()

    train(parallel, own(images), dist.group.WORLD)
    train(alone, images, None)
    for ours, expected in zip(student.parameters(), alone.parameters(), strict=True):
        assert_close(ours.detach(), expected.detach(), "parameters")


def without_gradients() -> None:
    student, teacher = whole_batch(4, 4, 4).requires_grad_(), whole_batch(3, 4, 4)
    for form in ("feature", "gram"):
        with torch.no_grad():
            loss = kdkernels.local_correlation_loss(own(student), own(teacher), 2, form=form, group=dist.group.WORLD)
        assert not loss.requires_grad
        assert_close(loss, kdkernels.local_correlation_loss(student, teacher, 2).detach())


def half_precision_under_autocast() -> None:
    student, teacher = (whole_batch(9).to(torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            kdkernels.correlation_congruence_loss(own(student), own(teacher), kernel=kernel, group=dist.group.WORLD)
            for kernel in ("bilinear", "rbf")
        ]
    for loss, kernel in zip(losses, ("bilinear", "rbf"), strict=True):
        assert loss.dtype == torch.float32
        assert_close(loss, kdkernels.correlation_congruence_loss(student.double(), teacher.double(), kernel=kernel))


def explanation() -> None:
    """The form depends on the widths, because they determine what is sent."""
    narrow, wide = own(whole_batch(2, 4, 4)), own(whole_batch(64, 8, 8))
    for maps, form in ((narrow, "feature"), (wide, "gram")):
        told = kdkernels.explain("local_correlation_loss", maps, maps, 2, group=dist.group.WORLD)
        assert f"all pairs over {dist.get_world_size()} ranks: {form} form (1 x {4 * sum(shares())} rows" in str(told)


def second_backward() -> None:
    student, teacher = own(whole_batch(5)).requires_grad_(), own(whole_batch(5))
    for loss in (
        kdkernels.correlation_congruence_loss(student, teacher, group=dist.group.WORLD),
        kdkernels.inter_class_correlation_loss(student, teacher, per_sample=True, group=dist.group.WORLD),
    ):
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert torch.equal(first, again)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        raises(RuntimeError, "no second derivative", lambda gradient=gradient: gradient.sum().backward())


def nan_anywhere() -> None:
    """NaN on one rank is NaN on all."""
    student, teacher = own(whole_batch(5)), own(whole_batch(5))
    if dist.get_rank() == 0:
        student = student.clone()
        student[0, 0] = torch.nan
    for loss in (
        kdkernels.correlation_congruence_loss(student, teacher, group=dist.group.WORLD),
        kdkernels.similarity_preserving_loss(student, teacher, group=dist.group.WORLD),
        kdkernels.inter_class_correlation_loss(student, teacher, group=dist.group.WORLD),
        kdkernels.relational_kd_loss(student, teacher, group=dist.group.WORLD),
    ):
        assert loss.isnan()


def subgroup() -> None:
    """Check a group of all ranks except the last."""
    members = list(range(max(1, dist.get_world_size() - 1)))
    group = dist.new_group(members)
    batch, target = torch.randn(2, 3 * len(members), 5)
    if dist.get_rank() not in members:
        raises(ValueError, "belongs to", lambda: kdkernels.correlation_congruence_loss(batch, batch, group=group))
        return
    student, teacher = (x.chunk(len(members))[dist.get_rank()] for x in (batch, target))
    loss = kdkernels.correlation_congruence_loss(student, teacher, group=group)
    assert_close(loss, kdkernels.correlation_congruence_loss(batch.double(), target.double()))


def group_by_name() -> None:
    """Check a loss that was built before there was a group, and copies of a loss that has a group."""
    student, teacher = whole_batch(5), whole_batch(5)
    maps, targets = whole_batch(3, 4, 4), whole_batch(2, 4, 4)
    batches = {
        name: (maps, targets) if name[:5] in ("Local", "Token") else (student, teacher) for name in grouped_losses(None)
    }
    expected = {name: loss(*batches[name]) for name, loss in grouped_losses(None).items()}
    group = dist.new_group(list(range(dist.get_world_size())))
    for given in ("world", dist.group.WORLD, group):
        for name, loss in grouped_losses(given).items():
            inputs = [own(x) for x in batches[name]]
            for copied in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
                assert copied.group == given
                assert_close(copied(*inputs), expected[name], name)
    matrices = kdkernels.similarity_matrices([own(student)], group="world")
    assert_close(matrices, own(student @ student.T)[None])
    told = kdkernels.explain("local_correlation_loss", own(maps), own(targets), 2, group="world")
    assert f"over {dist.get_world_size()} ranks" in str(told)
    average = torch.optim.swa_utils.AveragedModel(kdkernels.nn.SemanticCalibration((3,), (2,), 32, group=group))
    assert average.module.group is group
    assert_close(
        kdkernels.nn.SemCKDLoss(group="world")(*average.module.double()([own(maps)], [own(targets)])),
        kdkernels.nn.SemCKDLoss(group=group)(*average.module([own(maps)], [own(targets)])).detach(),
    )


def grouped_losses(group: object) -> dict[str, nn.Module]:
    names = (
        "CorrelationCongruenceLoss",
        "DISTLoss",
        "InterClassCorrelationLoss",
        "ProbabilisticTransferLoss",
        "RelationalKDLoss",
        "SimilarityPreservingLoss",
    )
    losses = {name: getattr(kdkernels.nn, name)(group=group) for name in names}
    losses["TokenRelationLoss"] = kdkernels.nn.TokenRelationLoss(group=group)
    return losses | {"LocalCorrelationLoss": kdkernels.nn.LocalCorrelationLoss(2, group=group)}


def sharded_projections() -> None:
    """Every projection and every linear layer of the MLPs is sharded separately."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(3)
    sharded, whole = (kdkernels.nn.SemanticCalibration((8, 4), (4, 4), 8) for _ in range(2))
    whole.load_state_dict(sharded.state_dict())
    maps = [torch.randn(8, channels, 4, 4) for channels in (8, 4, 4, 4)]
    for module in sharded.modules():
        if isinstance(module, nn.Sequential | nn.Linear):
            fully_shard(module, mesh=mesh)
    losses = [kdkernels.nn.SemCKDLoss()(*module(maps[:2], maps[2:])) for module in (sharded, whole)]
    assert_close(losses[0], losses[1].detach())
    for loss in losses:
        loss.backward()
    for ours, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6)


def dtensors() -> None:
    """Means over samples, of samples that are sharded unevenly or replicated, and some ranks without any."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, maps, labels = torch.randn(2, 5, 7), torch.randn(2, 5, 3, 4, 4), torch.randint(7, (5,))
    losses = {
        kdkernels.kd_loss: logits,
        kdkernels.logit_mse_loss: logits,
        functools.partial(kdkernels.inter_class_correlation_loss, per_sample=True): logits,
        kdkernels.hint_loss: maps,
        kdkernels.channel_wise_loss: maps,
        kdkernels.attention_transfer_loss: maps,
    }
    for placements in ([Shard(0)], [Replicate()]):
        for samples in (1, 5):
            for loss, (student, teacher) in losses.items():
                whole = student[:samples].clone().requires_grad_()
                expected = loss(whole, teacher[:samples])
                expected.backward()
                leaf = distribute_tensor(student[:samples], mesh, placements).requires_grad_()
                value = loss(leaf, distribute_tensor(teacher[:samples], mesh, placements))
                value.backward()
                assert list(leaf.grad.placements) == placements
                assert_close(value.to_local(), expected.detach())
                assert_close(leaf.grad.full_tensor(), whole.grad)
        s, t, y = (distribute_tensor(x, mesh, placements) for x in (*logits, labels))
        assert_close(
            kdkernels.teacher_free_kd_loss(s, t, y).to_local(), kdkernels.teacher_free_kd_loss(*logits, labels)
        )
        raises(TypeError, "student must be a plain tensor, got a DTensor", lambda s=s, t=t: similar(s, t))
        mask = torch.tensor([True, False, True, True, False])
        placed = distribute_tensor(mask, mesh, placements)
        for loss in (kdkernels.hint_loss, kdkernels.channel_wise_loss, kdkernels.logit_mse_loss):
            of_one = logits if loss is kdkernels.logit_mse_loss else maps
            value = loss(*(distribute_tensor(x, mesh, placements) for x in of_one), mask=placed)
            assert_close(value.to_local(), loss(*of_one, mask=mask))
        raises(
            TypeError,
            "mask must be a DTensor as",
            lambda s=s, t=t, mask=mask: kdkernels.logit_mse_loss(s, t, mask=mask),
        )
        raises(
            TypeError,
            "teacher_logits must be a DTensor as student_logits is, got a plain tensor",
            lambda s=s: kdkernels.kd_loss(s, logits[1]),
        )
    columns, sharded = distribute_tensor(logits[0], mesh, [Shard(1)]), distribute_tensor(logits[0], mesh, [Shard(0)])
    raises(TypeError, "must be replicated or sharded over samples", lambda: kdkernels.kd_loss(columns, columns))
    raises(TypeError, "must have student_logits's mesh", lambda: kdkernels.kd_loss(sharded, columns))
    rows = distribute_tensor(torch.randn(2 * dist.get_world_size(), 3), mesh, [Shard(0)])
    told = similar(rows.to_local(), 2 * rows.to_local(), group=mesh.get_group())
    assert_close(told, similar(rows.full_tensor(), 2 * rows.full_tensor()))


def similar(student: Tensor, teacher: Tensor, **settings: object) -> Tensor:
    return kdkernels.similarity_preserving_loss(student, teacher.square(), **settings)


def disagreement() -> None:
    if dist.get_world_size() == 1:
        return
    odd = dist.get_rank() == 1
    world = dist.group.WORLD
    rows = torch.randn(3, 5 + odd)
    raises(
        ValueError,
        "student's width must be the same on all ranks of group, got 5 on rank 0 and 6 on rank 1",
        lambda: kdkernels.correlation_congruence_loss(rows, rows, group=world),
    )
    maps = torch.randn(3, 2, 4, 4)
    raises(
        ValueError,
        "k must be the same",
        lambda: kdkernels.local_correlation_loss(maps, maps, 4 if odd else 2, group=world),
    )
    raises(TypeError, "group must be a torch.distributed process group, got str", lambda: loss_with_group("gloo"))


def loss_with_group(group: object) -> Tensor:
    return kdkernels.inter_class_correlation_loss(torch.randn(2, 3), torch.randn(2, 3), group=group)


def raises(error: type[Exception], message: str, run: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        run()


def collect() -> None:
    for dtype in (torch.float64, torch.float32):
        for form in ("feature", "gram", "auto"):
            case(local_correlation, form, dtype)
            for reduction in ("sum", "mean"):
                case(local_correlation, form, dtype, weights=(0.5, 2.0, 1.5), reduction=reduction)
            case(local_correlation, form, dtype, weights=(1.0, 0.0, 0.0), teacher_learns=False)
            case(similarity, form, dtype)
        case(local_correlation, "auto", dtype, masked=True)
        for kernel in ("taylor_rbf", "rbf", "bilinear", "mmd"):
            case(masked, "correlation_congruence_loss", dtype, 5, kernel=kernel)
        for form in ("feature", "gram"):
            case(masked, "similarity_preserving_loss", dtype, 2, 3, form=form)
        case(masked, "correlation_congruence_loss", dtype, 5, kernel="rbf", normalize=False, reduction="sum")
        case(masked, "relational_kd_loss", dtype, 5)
        case(masked, "probabilistic_transfer_loss", dtype, 5)
        for kernel in ("taylor_rbf", "rbf", "bilinear", "mmd"):
            case(congruence, dtype, kernel=kernel)
        for form in ("feature", "gram"):
            case(congruence, dtype, kernel="bilinear", form=form, normalize=False, reduction="sum")
            for learns in ((True, False), (False, True)):
                case(similarity, form, dtype, learns, reduction="sum")
        for across in ("image", "batch"):
            for comparison in ("mse", "kl"):
                case(tokens, dtype, comparison=comparison, across=across)
                case(tokens, dtype, masked=True, comparison=comparison, across=across)
            case(tokens, dtype, masked=True, reduction="sum", across=across)
        case(tokens, dtype, masked=True, comparison="hinge", margin=0.1, clip="both", across="batch")
        case(tokens, dtype, masked=True, comparison="mse", heads=2, across="batch", form="feature")
        for comparison in ("hinge", "cross_entropy"):
            case(tokens, dtype, comparison=comparison, clip="teacher", heads=2, across="batch", temperature=0.7)
        for given in ({"masked": True}, {"normalize": False, "comparison": "kl", "temperature": 20.0}):
            case(tokens_by_channels, dtype, **given)
        case(contrastive, dtype)
        case(contrastive, dtype, comparison="cross_entropy", reduction="sum", normalize=False)
        case(inter_class, dtype)
        case(correlations, dtype)
        case(inter_class, dtype, scale=20.0, reduction="sum")
        case(inter_class, dtype, per_sample=True)
        case(masked_inter_class, dtype)
        case(masked_inter_class, dtype, per_sample=True, reduction="sum")
        for reduction in ("mean", "sum"):
            case(cross_layer, dtype, reduction)
            case(masked_cross_layer, dtype, reduction)
        case(similarities, dtype)
        for learns in ((True, False), (True, True)):
            case(embeddings, dtype, kdkernels.relational_kd_loss, learns)
            case(embeddings, dtype, kdkernels.probabilistic_transfer_loss, learns)
    # In float32, rounding determines the gradient of a correlation of two samples.
    case(masked, "dist_loss", torch.float64, 6)
    case(foreign_blocks)
    for form in ("feature", "gram"):
        case(parallel_training, form)
    for function in (
        inter_class_of_many_classes,
        without_gradients,
        explanation,
        half_precision_under_autocast,
        second_backward,
        nan_anywhere,
        subgroup,
        masked_matrices,
        calibration,
        contrast,
        relations_of_samples,
        matching,
        group_by_name,
        sharded_projections,
        dtensors,
    ):
        case(function)
    case(disagreement)


def main(seed: int) -> None:
    """Run every case. A failure ends this rank. Otherwise the other ranks would wait for its collectives."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    distributed.CHUNK = 64  # several chunks of rows
    collect()
    for number, (name, run) in enumerate(CASES.items()):
        torch.manual_seed(seed + number)
        try:
            run()
        except Exception:
            sys.exit(f"{name} on rank {dist.get_rank()}: {traceback.format_exc()}")
    dist.destroy_process_group()
    # Exit without finalising Python. Otherwise a gloo thread that still releases the tensors of its last message would
    # abort.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
