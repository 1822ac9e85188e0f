"""Run by torchrun with any number of processes: every loss over all ranks against one process on the whole batch."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels
from kdkernels import distributed
from kdkernels.ops.icc import distributed as icc_over_ranks

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[..., None], *arguments: object, **settings: object) -> None:
    name = " ".join([function.__name__, *map(str, arguments), *map(str, settings.values())])
    CASES[name] = functools.partial(function, *arguments, **settings)


def shares(count: int = 11) -> list[int]:
    """Uneven shares of a batch: the last rank has least."""
    world = dist.get_world_size()
    return [count // world + (rank < count % world) + (rank == 0) - (rank == world - 1) for rank in range(world)]


def whole_batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(shares()), *shape, dtype=dtype)


def own(batch: Tensor) -> Tensor:
    """This rank's samples."""
    return batch.detach().split(shares())[dist.get_rank()]


def agree(loss: Callable[..., Tensor], *batches: Tensor, exactly: Callable[..., Tensor] | None = None) -> None:
    """Loss and gradients of the whole batch in float64, from every rank's samples and ``group``."""
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
            # DistributedDataParallel will average over the ranks. Errors are relative to the whole gradient's norm.
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


def inter_class(dtype: torch.dtype, scale: float = 1.0, **settings: object) -> None:
    loss = functools.partial(kdkernels.inter_class_correlation_loss, **settings)
    agree(loss, *((scale * whole_batch(6, dtype=dtype)).requires_grad_() for _ in range(2)))


def inter_class_of_many_classes() -> None:
    """Maps of which only some rows are held at a time, here for want of room for four entries."""
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
    # Attention is never negative: errors weighed by either sign may add up to next to nothing.
    weights = whole_batch(2, 1, dtype=dtype).abs()
    agree(loss, *(x.requires_grad_() for x in maps), weights.requires_grad_())


def calibration() -> None:
    """SemCKD as modules: samples attend by their similarities to those of all ranks."""
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


def similarities(dtype: torch.dtype) -> None:
    """Rows of the matrices on every rank; a loss that depends on the rank's own rows alone.

    Its terms are of one sign, lest they add up to next to nothing.
    """
    weight = whole_batch(2, sum(shares())).abs()

    def loss(*features: Tensor, group: object = None) -> Tensor:
        matrices = kdkernels.similarity_matrices(features, group=group)
        terms = (matrices.transpose(0, 1).square() * (own(weight) if group else weight).to(matrices)).sum()
        return distributed.sum_over(distributed.meet(group, 1, terms.device), terms) if group else terms

    agree(loss, whole_batch(3, 2, 2, dtype=dtype).requires_grad_(), whole_batch(5, dtype=dtype).requires_grad_())


def parallel_training(form: str) -> None:
    """A network under DistributedDataParallel learns what one process learns from the whole batch."""
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
    """The form follows the widths of what would travel."""
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
    """The ranks but the last, among themselves."""
    members = list(range(max(1, dist.get_world_size() - 1)))
    group = dist.new_group(members)
    batch, target = torch.randn(2, 3 * len(members), 5)
    if dist.get_rank() not in members:
        raises(ValueError, "belongs to", lambda: kdkernels.correlation_congruence_loss(batch, batch, group=group))
        return
    student, teacher = (x.chunk(len(members))[dist.get_rank()] for x in (batch, target))
    loss = kdkernels.correlation_congruence_loss(student, teacher, group=group)
    assert_close(loss, kdkernels.correlation_congruence_loss(batch.double(), target.double()))


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
            case(local_correlation, form, dtype, weights=(0.5, 2.0, 1.5), reduction="mean")
            case(local_correlation, form, dtype, weights=(1.0, 0.0, 0.0), teacher_learns=False)
            case(similarity, form, dtype)
        case(local_correlation, "auto", dtype, masked=True)
        for kernel in ("taylor_rbf", "rbf", "bilinear", "mmd"):
            case(congruence, dtype, kernel=kernel)
        for form in ("feature", "gram"):
            case(congruence, dtype, kernel="bilinear", form=form, normalize=False, reduction="sum")
            for learns in ((True, False), (False, True)):
                case(similarity, form, dtype, learns, reduction="sum")
        case(inter_class, dtype)
        case(inter_class, dtype, scale=20.0, reduction="sum")
        case(inter_class, dtype, per_sample=True)
        for reduction in ("mean", "sum"):
            case(cross_layer, dtype, reduction)
        case(similarities, dtype)
        for learns in ((True, False), (True, True)):
            case(embeddings, dtype, kdkernels.relational_kd_loss, learns)
            case(embeddings, dtype, kdkernels.probabilistic_transfer_loss, learns)
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
        calibration,
    ):
        case(function)
    case(disagreement)


def main(seed: int) -> None:
    """Run every case; the first to fail ends this rank, whose collectives the others would wait for."""
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
    # Without finalising Python: a thread of gloo that releases the tensors of its last message meanwhile would abort.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
