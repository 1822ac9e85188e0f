"""Peak extra memory of every operator, forward and backward, against the formula in its docstring.

One process loads everything. A fork of it runs each case, so that a case does not reuse freed memory of another case.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import Pool
from typing import NamedTuple

import pytest
import torch
from helpers import peak_growth
from losses import operators_of
from torch import Tensor

import kdkernels
from kdkernels import native
from kdkernels.ops.congruence import congruence
from kdkernels.ops.operator import OPERATORS

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)
SLACK = 2**22  # bytes of the kernels' scratch memory, and of objects that are not tensors


class Case(NamedTuple):
    """A loss, the shapes of its inputs (the first one learns), and the formula in numbers of 4 bytes."""

    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    numbers: int


def strip(rows: int) -> int:
    return min(rows, 512) * rows


def lkd(form: str, numbers: int) -> Case:
    maps, rows, width = (256, 16, 32, 16), 256 * 16, 16 * 8 * 4
    loss = functools.partial(kdkernels.local_correlation_loss, k=4, form=form)
    return Case(loss, (maps, maps), 4 * rows * width + numbers)


def cckd(kernel: str, form: str, numbers: int) -> Case:
    loss = functools.partial(kdkernels.correlation_congruence_loss, kernel=kernel, form=form)
    return Case(loss, ((4096, 512), (4096, 256)), 4096 * (3 * 512 + 256) + numbers)


def sp(form: str, shape: tuple[int, int], numbers: int) -> Case:
    return Case(functools.partial(kdkernels.similarity_preserving_loss, form=form), (shape, shape), numbers)


def many_tokens(form_numbers: int, **settings: object) -> Case:
    shape, gradient, packed = (4, 2048, 512), 4 * 2048 * 512, 2048 * (512 + 512)
    loss = functools.partial(kdkernels.token_relation_loss, **settings)
    return Case(loss, (shape, shape), 2 * gradient + packed + form_numbers)


def pkt(rows: int, student: int, teacher: int) -> Case:
    numbers = 10 * rows**2 + rows * max(4 * student, 2 * student + 2 * teacher)
    return Case(kdkernels.probabilistic_transfer_loss, ((rows, student), (rows, teacher)), 2 * numbers)


def icct(per_sample: bool) -> Case:
    loss = functools.partial(kdkernels.inter_class_correlation_loss, per_sample=per_sample)
    return Case(loss, ((128, 2000),) * 2, 5 * 128 * 2000)  # a third of K²


def tokens(comparison: str, form: str, numbers: int) -> Case:
    loss = functools.partial(kdkernels.token_relation_loss, comparison=comparison, form=form)
    return Case(loss, ((8, 1024, 384), (8, 1024, 384)), 2 * 8 * 1024 * 384 + 2 * 1024 * 384 + numbers)


MAPS = ((64, 64, 64, 64), (64, 64, 32, 32))
CASES = {
    "local_correlation, Gram form": lkd("gram", strip(4096)),
    "local_correlation, feature form": lkd("feature", 512**2),
    "correlation_congruence taylor": cckd("taylor_rbf", "gram", 2 * strip(4096)),
    "correlation_congruence rbf": cckd("rbf", "gram", 2 * strip(4096)),
    "correlation_congruence bilinear, feature form": cckd("bilinear", "feature", 512**2),
    "similarity_preserving, Gram form": sp("gram", (2048, 1024), 2 * 2048 * 1024 + 2 * strip(2048)),
    "similarity_preserving, feature form": sp("feature", (8192, 256), 5 * 8192 * 256 + 3 * 256**2),
    "token_relation of many tokens, feature form": many_tokens(512**2, form="feature"),
    "token_relation hinge of many tokens": many_tokens(2 * 256 * 2048, comparison="hinge", margin=0.1),
    "token_relation kl of many tokens": many_tokens(2 * 256 * 2048, comparison="kl", temperature=0.1),
    "icc": icct(False),
    "icc per sample": icct(True),
    "icc map": Case(lambda z: kdkernels.inter_class_correlation(z).sum(), ((16, 2000),), 2000**2),
    "gram": Case(lambda *f: kdkernels.similarity_matrices(f).sum(), ((256, 65536), (256, 16384)), 256 * 65536),
    "feature_mse": Case(
        lambda s, t: kdkernels.cross_layer_mse([[s]], [[t]], torch.ones(len(s), 1, 1)), MAPS, MAPS[0][0] ** 4
    ),
    "hint": Case(kdkernels.hint_loss, MAPS, MAPS[0][0] ** 4),
    "kd": Case(kdkernels.kd_loss, ((2048, 1000),) * 2, 2 * 2048 * 1000),
    "divergence": Case(kdkernels.kd_loss, ((128, 32000),) * 2, 128 * 32000),
    "divergence, jsd": Case(
        functools.partial(kdkernels.kd_loss, divergence="jsd", standardize=True), ((4096, 500),) * 2, 4096 * 520
    ),
    "divergence, top-k": Case(
        lambda s, t: kdkernels.kd_loss(s, t.log_softmax(1), teacher_indices=torch.arange(5).expand(len(t), 5)),
        ((512, 8000), (512, 5)),
        512 * (8000 + 100),
    ),
    "congruence": Case(
        functools.partial(congruence, positions=2, form="gram"), ((4096, 64),) * 2, 2 * 4096 * 64 + strip(4096)
    ),
    "dkd": Case(
        lambda s, t: kdkernels.dkd_loss(s, t, torch.zeros(len(s), dtype=torch.int64)),
        ((2048, 1000),) * 2,
        2 * 2048 * 1000,
    ),
    "dist": Case(kdkernels.dist_loss, ((2048, 1000),) * 2, 4 * 2048 * 1000),
    "token_relation": tokens("mse", "auto", 384**2),
    "token_relation, hinge": tokens("hinge", "auto", 2 * strip(1024)),
    "token_relation, kl": tokens("kl", "auto", 2 * 1024**2),
    "channel_wise": Case(kdkernels.channel_wise_loss, ((64, 64, 32, 32),) * 2, 2 * 64 * 64 * 1024),
    "teacher_free_kd": Case(
        lambda s, t: kdkernels.teacher_free_kd_loss(s, t, torch.zeros(len(s), dtype=torch.int64)),
        ((2048, 1000),) * 2,
        4 * 2048 * 1000,
    ),
    "logit_mse": Case(kdkernels.logit_mse_loss, ((4096, 1000),) * 2, 4096 * 1000),
    "rkd": Case(
        kdkernels.relational_kd_loss, ((768, 512), (768, 256)), 2 * (5 * 768**2 + 768 * (1024 + 256)) + 2 * 768 * 512
    ),
    "pkt": pkt(1024, 512, 512),
    "pkt wide": pkt(200, 10000, 5000),
    "pkt wide teacher": pkt(200, 2000, 10000),
    "attention_transfer": Case(kdkernels.attention_transfer_loss, ((64, 64, 32, 32),) * 2, 2 * 64 * 64 * 1024),
    "kernel_matrix": Case(lambda x: kdkernels.kernel_matrix(x).sum(), ((1024, 64),), 6 * 1024**2),
    "local_correlation matrices": Case(lambda x: kdkernels.local_correlation(x, 4).sum(), ((128, 4, 8, 8),), 2048**2),
}


def test_every_operator_has_a_case() -> None:
    reached = set()
    for loss, shapes, _ in CASES.values():
        reached |= operators_of(loss, *(torch.randn(2, *shape[1:]) for shape in shapes))
    assert reached | {"convolution"} == set(OPERATORS)  # test_semckd measures the projections


@pytest.fixture(scope="module")
def children() -> Iterator[Pool]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kdkernels"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # otherwise the allocator keeps some freed memory
        with context.Pool(1, maxtasksperchild=1) as pool:
            yield pool


@pytest.mark.parametrize("name", CASES)
def test_peak_extra_memory(children, name):
    """The peak is at most the formula, and the formula is not much larger than the peak."""
    formula = 4 * CASES[name].numbers
    extra = children.apply(peak, (name,))
    assert formula / 2 < extra <= formula + SLACK, f"{extra / 2**20:.1f} MiB, of {formula / 2**20:.1f} MiB"


def peak(name: str) -> int:
    torch.set_num_threads(1)
    loss, shapes, _ = CASES[name]

    def step(inputs: list[Tensor]) -> None:
        loss(*inputs).backward()

    def draw(shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
        return [torch.randn(shape, requires_grad=index == 0) for index, shape in enumerate(shapes)]

    step(draw((2, *shape[1:]) for shape in shapes))  # loads what the first call of a process needs
    inputs = draw(shapes)
    return peak_growth(lambda: step(inputs))
