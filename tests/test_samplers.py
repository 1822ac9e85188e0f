"""What the samplers' batches are made of, over whole epochs and across ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.samplers import ClassUniformSampler, SuperclassUniformSampler

EVEN = torch.arange(120) % 10
UNEVEN = torch.repeat_interleave(torch.arange(7), torch.tensor([4, 5, 9, 30, 7, 12, 4]))


def epoch(sampler: ClassUniformSampler) -> list[list[int]]:
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@pytest.mark.parametrize("labels", [EVEN, UNEVEN[torch.randperm(len(UNEVEN))] * 3 + 1], ids=["even", "uneven"])
@pytest.mark.parametrize(("classes", "samples"), [(5, 4), (3, 2), (7, 4), (1, 3)], ids=str)
def test_every_batch_is_classes_times_samples(labels, classes, samples):
    for batch in epoch(ClassUniformSampler(labels, classes, samples)):
        runs = torch.tensor(batch).view(classes, samples)
        assert (labels[runs] == labels[runs[:, :1]]).all()
        assert len(labels[runs[:, 0]].unique()) == classes
        assert len(set(batch)) == classes * samples


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_comes_exactly_once_where_all_divides(world_size):
    ranks = [ClassUniformSampler(EVEN, 5, 2, rank=r, world_size=world_size) for r in range(world_size)]
    drawn = Counter(i for rank in ranks for batch in epoch(rank) for i in batch)
    assert drawn == Counter(range(120))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("classes", "samples"), [(3, 4), (5, 2), (4, 3)], ids=str)
def test_every_example_comes_on_one_rank(world_size, classes, samples):
    ranks = [ClassUniformSampler(UNEVEN, classes, samples, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    drawn = [{i for batch in epoch(rank) for i in batch} for rank in ranks]
    assert set.union(*drawn) == set(range(len(UNEVEN)))
    assert sum(map(len, drawn)) == len(UNEVEN)


def test_the_length_of_an_epoch():
    """Groups of 4: 1, 2, 3, 8, 2, 3, 1 of them, 20 in all."""
    assert len(ClassUniformSampler(UNEVEN, 2, 4)) == 10
    assert len(ClassUniformSampler(UNEVEN, 3, 4)) == 8  # as many as the largest class has
    counts = Counter(UNEVEN[batch[0::4]][c].item() for batch in ClassUniformSampler(UNEVEN, 2, 4) for c in range(2))
    assert [counts[c] for c in range(7)] == [1, 2, 3, 8, 2, 3, 1]


def test_groups_are_completed_with_other_examples():
    drawn = Counter(i for batch in ClassUniformSampler(torch.zeros(10).long(), 1, 4) for i in batch)
    assert set(drawn) == set(range(10))
    assert sorted(drawn.values()) == [1] * 8 + [2] * 2


def test_epochs_differ_and_repeat():
    sampler, twin = ClassUniformSampler(EVEN, 5, 3, seed=7), ClassUniformSampler(EVEN, 5, 3, seed=7)
    first = epoch(sampler)
    assert epoch(sampler) == first == epoch(twin)
    sampler.set_epoch(1)
    assert epoch(sampler) != first
    twin.set_epoch(1)
    assert epoch(sampler) == epoch(twin)
    assert epoch(ClassUniformSampler(EVEN, 5, 3, seed=8)) != first


def test_all_pairs_of_classes_meet():
    sampler, pairs = ClassUniformSampler(EVEN, 2, 4), set()
    for number in range(60):
        sampler.set_epoch(number)
        pairs |= {frozenset(EVEN[batch].tolist()) for batch in sampler}
    assert len(pairs) == 45


def test_with_a_data_loader():
    data = TensorDataset(torch.arange(120), EVEN)
    loader = DataLoader(data, batch_sampler=ClassUniformSampler(EVEN.tolist(), 5, 4))
    assert len(loader) == 6
    for examples, labels in loader:
        assert labels.tolist() == EVEN[examples].tolist()
        assert Counter(labels.tolist()).most_common()[-1][1] == 4


# Superclasses ---------------------------------------------------------------------------------------------------------


def clouds(sizes: list[int]) -> torch.Tensor:
    """Points about the corners of a simplex, far apart."""
    return torch.cat([100 * torch.eye(len(sizes))[c] + torch.randn(size, len(sizes)) for c, size in enumerate(sizes)])


def test_superclasses_are_clusters():
    sizes = [12, 20, 8, 16]
    sampler = SuperclassUniformSampler(clouds(sizes), 4, 2, 4)
    truth = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    assert all(len(sampler.labels[truth == c].unique()) == 1 for c in range(4))
    drawn = Counter(i for batch in epoch(sampler) for i in batch)
    assert drawn == Counter(range(56))
    assert all(len(truth[batch].unique()) == 2 for batch in sampler)


def test_tiny_clusters_repeat_their_examples():
    sampler = SuperclassUniformSampler(clouds([1, 3, 20]), 3, 3, 4)
    batches = epoch(sampler)
    assert {i for batch in batches for i in batch} == set(range(24))
    for batch in batches:
        assert sorted(Counter(sampler.labels[batch].tolist()).values()) == [4, 4, 4]
        assert batch.count(0) == 4


def test_recluster():
    features = clouds([10, 10, 10])
    sampler = SuperclassUniformSampler(features, 3, 2)
    order = torch.arange(30).view(3, 10).T.flatten()
    sampler.recluster(features[order])
    assert all(len(sampler.labels[c::3].unique()) == 1 for c in range(3))
    assert {i for batch in epoch(sampler) for i in batch} == set(range(30))
    with pytest.raises(ValueError, match="features must be of the same 30 examples, got 20"):
        sampler.recluster(features[:20])


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((None, 2), {}, TypeError, "labels must hold the class of every example, got None"),
        ((["a", "b"], 2), {}, TypeError, "labels must be integers"),
        ((torch.ones(8), 2), {}, TypeError, "labels must be integers, got torch.float32"),
        ((torch.ones(8, 2).long(), 2), {}, ValueError, r"labels must have shape n.*got \(8, 2\)"),
        (([], 2), {}, ValueError, r"labels must have shape n, n > 0, got \(0,\)"),
        ((torch.tensor([0, 0, 1, 1, -1]), 2, 2), {}, ValueError, "labels must be >= 0, got -1: leave unlabelled"),
        ((EVEN, 11), {}, ValueError, "classes must be at most the 10 there are, got 11"),
        ((EVEN, 0), {}, ValueError, "classes must be a positive integer, got 0"),
        ((EVEN, 2, 0), {}, ValueError, "samples must be a positive integer, got 0"),
        ((UNEVEN, 2, 5), {}, ValueError, "samples must be at most .* got 5, and class 0 has 4"),
        ((EVEN, 2), {"rank": 2, "world_size": 2}, ValueError, "rank must be less than world_size 2, got 2"),
        ((EVEN, 10), {"world_size": 13}, ValueError, "classes must be at most the number .* every rank.* got 10"),
        ((EVEN, 2), {"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
    ],
)
def test_misuse_is_explained(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        ClassUniformSampler(*arguments, **settings)


@pytest.mark.parametrize(
    ("features", "superclasses", "error", "message"),
    [
        (None, 2, TypeError, "features must be a tensor, got NoneType"),
        (torch.ones(4, 2, 2), 2, ValueError, "features must have shape n x d"),
        (torch.ones(4, 2), 5, ValueError, "superclasses must be at most the 4 rows of features, got 5"),
        (torch.full((4, 2), torch.nan), 2, ValueError, "features must be finite"),
        (torch.randn(9, 2), 0, ValueError, "superclasses must be a positive integer, got 0"),
    ],
)
def test_misuse_of_superclasses_is_explained(features, superclasses, error, message):
    with pytest.raises(error, match=message):
        SuperclassUniformSampler(features, superclasses, 2)
