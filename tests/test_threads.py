"""Kernels called from many threads at once, and from the processes that a DataLoader forks."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kdkernels

LOSSES = {
    "local_correlation": lambda s, t: kdkernels.local_correlation_loss(s, t, 2),
    "correlation_congruence": lambda s, t: kdkernels.correlation_congruence_loss(s.flatten(1), t.flatten(1)),
    "similarity_preserving": kdkernels.similarity_preserving_loss,
    "token_relation": functools.partial(kdkernels.token_relation_loss, comparison="kl", temperature=0.1),
    "icc": lambda s, t: kdkernels.inter_class_correlation_loss(s.flatten(1), t.flatten(1)),
    "kd": lambda s, t: kdkernels.kd_loss(s.flatten(1), t.flatten(1)),
    "gram": lambda s, t: kdkernels.similarity_matrices([s, t]).square().sum(),
    "feature_mse": lambda s, t: kdkernels.cross_layer_mse([[s]], [[t]], torch.ones(len(s), 1, 1)),
}


def problem(index: int) -> tuple[Tensor, Tensor]:
    """Return maps whose number depends on the index, so that threads need scratch memory of different sizes."""
    generator = torch.Generator().manual_seed(index)
    student, teacher = (torch.randn(3 + 7 * (index % 5), 4, 4, 4, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def solve(name: str, index: int) -> tuple[Tensor, Tensor]:
    student, teacher = problem(index)
    loss = LOSSES[name](student, teacher)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("name", LOSSES)
def test_many_threads_at_once(name):
    expected = [solve(name, index) for index in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: solve(name, index % 20), range(200)))
    for index, result in enumerate(found):
        assert all(map(torch.equal, result, expected[index % 20]))


class Losses(Dataset):
    """A data set whose items need every kernel."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[Tensor]:
        return [value for name in LOSSES for value in solve(name, 5 * index)]


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_forked_after_the_kernels_have_run(threads):
    """OpenMP threads do not survive a fork, so workers must not wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = list(DataLoader(Losses(), batch_size=None))
        loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for found, exact in zip(loader, expected, strict=True):
            for a, b in zip(found, exact, strict=True):
                # Workers have one thread, so their sums may be split differently.
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
