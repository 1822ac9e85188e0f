"""The content of the samplers' batches, over whole epochs and across ranks."""

from __future__ import annotations

import array
import contextlib
import copy
import itertools
import json
import pickle
import types
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SequentialSampler, TensorDataset

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
    """The classes have 1, 2, 3, 8, 2, 3 and 1 groups of 4, which are 20 groups."""
    assert len(ClassUniformSampler(UNEVEN, 2, 4)) == 10
    assert len(ClassUniformSampler(UNEVEN, 3, 4)) == 8  # as many as the largest class has
    counts = Counter(UNEVEN[batch[0::4]][c].item() for batch in ClassUniformSampler(UNEVEN, 2, 4) for c in range(2))
    assert [counts[c] for c in range(7)] == [1, 2, 3, 8, 2, 3, 1]


def test_groups_are_completed_with_other_examples():
    drawn = Counter(i for batch in ClassUniformSampler(torch.zeros(10).long(), 1, 4) for i in batch)
    assert set(drawn) == set(range(10))
    assert sorted(drawn.values()) == [1] * 8 + [2] * 2


def test_each_iteration_draws_the_next_epoch():
    sampler, twin = (ClassUniformSampler(EVEN, 5, 3, seed=7) for _ in range(2))
    epochs = [epoch(sampler) for _ in range(3)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    for number in (2, 0, 1):
        twin.set_epoch(number)
        assert epoch(twin) == epochs[number]
    assert epoch(ClassUniformSampler(EVEN, 5, 3, seed=8)) != epochs[0]


def test_a_set_epoch_stays_until_the_next_call():
    sampler, twin = (ClassUniformSampler(EVEN, 5, 3, seed=7) for _ in range(2))
    sampler.set_epoch(np.int64(4))
    twin.sampler.set_epoch(4)  # like trainers
    first = epoch(sampler)
    assert epoch(sampler) == first == epoch(twin)
    sampler.set_epoch(5)
    assert epoch(sampler) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_moves_on_by_one_epoch(workers):
    """A loader with workers makes two iterators per epoch, and draws only from one of them."""
    loader, sampler = (ClassUniformSampler(EVEN, 5, 3) for _ in range(2))
    loader = DataLoader(range(120), batch_sampler=loader, num_workers=workers, collate_fn=list)
    for _ in range(3):
        assert list(loader) == epoch(sampler)


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


def test_the_attributes_of_a_batch_sampler():
    sampler = ClassUniformSampler(EVEN, 5, 4)
    assert isinstance(sampler, BatchSampler)
    assert (sampler.batch_size, sampler.drop_last) == (20, False)
    assert isinstance(sampler.sampler, Sampler)
    assert {len(batch) for batch in sampler} == {sampler.batch_size}


def test_a_small_class_is_named_or_repeats_its_examples():
    labels = ["cat"] * 9 + ["dog"] * 2 + ["owl"] * 3
    with pytest.raises(ValueError, match=r"got 4, and class 'dog' has 2, and 1 other .*replacement=True repeats"):
        ClassUniformSampler(labels, 3, 4)
    batches = epoch(ClassUniformSampler(labels, 3, 4, replacement=True))
    for batch in batches:
        assert Counter(labels[i] for i in batch) == {"cat": 4, "dog": 4, "owl": 4}
    assert {i for batch in batches for i in batch} == set(range(14))


# Labels ---------------------------------------------------------------------------------------------------------------

CLASSES = [3, 1, 1, 0, 3, 0, 2, 2, 3, 1, 0, 2]
NUMPY = np.array(CLASSES)


class Column:
    """A column of a table on disk, as in Hugging Face datasets. It is only a sequence."""

    def __len__(self) -> int:
        return len(CLASSES)

    def __getitem__(self, index: int) -> int:
        return CLASSES[index]

    def __iter__(self) -> Iterator[int]:
        return iter(CLASSES)


LABELS = {
    "list": CLASSES,
    "tuple": tuple(CLASSES),
    "iterator": iter(CLASSES),
    "array": array.array("h", CLASSES),
    "column": Column(),
    "NumPy scalars": list(NUMPY),
    "tensor scalars": list(torch.tensor(CLASSES)),
    "read-only": np.frombuffer(np.array(CLASSES, np.uint8).tobytes(), np.uint8),
    "reversed": NUMPY[::-1].copy()[::-1],
    "strided": np.stack([NUMPY, -NUMPY], 1)[:, 0],
    "strided tensor": torch.tensor([CLASSES, CLASSES]).T[:, 1],
    "big-endian": NUMPY.astype(">i4"),
    "objects": NUMPY.astype(object),
    "text": np.array([f"class {label}" for label in CLASSES]),
    "strings": [f"class {label}" for label in CLASSES],
    "bytes": [bytes([label]) for label in CLASSES],
    "tuples": [("class", label) for label in CLASSES],
    "mixed": [("zero", 1, "two", 3)[label] for label in CLASSES],
    "negative": -NUMPY - 1,
    "above int64": NUMPY.astype(np.uint64) + np.uint64(2**63),
    "tensor above int64": torch.tensor([2**63 + label for label in CLASSES], dtype=torch.uint64),
} | {
    f"{make.__name__} {kind}{bits}": make(CLASSES, dtype=getattr(owner, f"{kind}{bits}"))
    for make, owner in ((np.array, np), (torch.tensor, torch))
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_type(name):
    sampler = ClassUniformSampler(LABELS[name], 4, 3)
    assert sampler.labels.dtype == torch.int64
    assert len(sampler.values) == 4
    for batch in epoch(sampler):
        runs = torch.tensor([CLASSES[i] for i in batch]).view(4, 3)
        assert (runs == runs[:, :1]).all()
        assert sorted(runs[:, 0].tolist()) == [0, 1, 2, 3]


def test_labels_of_pandas():
    pandas = pytest.importorskip("pandas")
    for column in (pandas.Series(CLASSES, index=range(50, 62)), pandas.Series(list("dbbadaccdbac"), dtype="category")):
        assert ClassUniformSampler(column, 4, 3).labels.tolist() == CLASSES


def test_truth_values_are_two_classes():
    for labels in ([True, False] * 4, np.array([True, False] * 4), torch.tensor([True, False] * 4)):
        assert ClassUniformSampler(labels, 2, 4).values == [False, True]


# Several processes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_place_is_that_of_the_process_group_at_the_time_of_the_iteration():
    sampler = ClassUniformSampler(UNEVEN, 3, 2)
    assert epoch(sampler) == epoch(ClassUniformSampler(UNEVEN, 3, 2, rank=0, world_size=1))
    for rank in range(3):
        with process_group(rank, 3):
            sampler.set_epoch(5)
            own = ClassUniformSampler(UNEVEN, 3, 2, rank=rank, world_size=3)
            own.set_epoch(5)
            assert epoch(sampler) == epoch(own)
            assert len(ClassUniformSampler(UNEVEN, 3, 2, rank=0, world_size=1)) > len(own)


def test_a_place_that_is_not_known_yet_is_asked_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sampler = ClassUniformSampler(EVEN, 5, 2)
    for draw in (iter, len):
        with pytest.raises(RuntimeError, match=r"rank and world_size must be known.*init_process_group first"):
            draw(sampler)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError, match=r"rank and world_size must be known .* got None and 2"):
        iter(ClassUniformSampler(EVEN, 5, 2, world_size=2))
    with process_group(1, 2):
        assert epoch(sampler) == epoch(ClassUniformSampler(EVEN, 5, 2, rank=1, world_size=2))
        with pytest.raises(ValueError, match="rank must be less than world_size 2, got 7"):
            iter(ClassUniformSampler(EVEN, 5, 2, rank=7))


def test_a_distributed_sampler_gives_the_place():
    """Lightning makes batch samplers again with its own sampler, if they take an argument of this name."""
    given = DistributedSampler(range(120), num_replicas=3, rank=2)
    expected = epoch(ClassUniformSampler(EVEN, 5, 2, rank=2, world_size=3))
    assert epoch(ClassUniformSampler(EVEN, 5, 2, sampler=given)) == expected
    assert epoch(ClassUniformSampler(EVEN, 5, 2, sampler=SequentialSampler(EVEN))) != expected
    with pytest.raises(TypeError, match=r"labels .* got DistributedSampler.*use_distributed_sampler=False"):
        ClassUniformSampler(given, batch_size=10, drop_last=False)


def prepared(**settings: object) -> list[Sampler]:
    """Return accelerate's version of a batch sampler in each of two processes."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    return [
        data_loader.BatchSamplerShard(
            ClassUniformSampler(UNEVEN, 4, 3), num_processes=2, process_index=rank, **settings
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("split", [False, True])
def test_accelerate_shares_out_the_batches_of_the_whole_data_set(split):
    """Each process draws all batches there, so that the shares of the process group must not be taken as well."""
    drawn = []
    for rank, sampler in enumerate(prepared(split_batches=split)):
        with process_group(rank, 2):
            drawn.append(list(sampler))
            assert len(drawn[-1]) == len(sampler)
    for batch in itertools.chain(*drawn):
        assert set(Counter(UNEVEN[batch].tolist()).values()) == {3}
    whole = epoch(ClassUniformSampler(UNEVEN, 4, 3))
    if split:
        assert [a + b for a, b in zip(*drawn, strict=True)] == whole
    else:
        assert [batch for pair in zip(*drawn, strict=True) for batch in pair][: len(whole)] == whole


def test_accelerate_must_not_separate_the_examples_of_a_class():
    sampler, _ = prepared(split_batches=True)
    sampler.batch_sampler = ClassUniformSampler(UNEVEN, 6, 3, rank=0, world_size=2)
    with process_group(0, 2), pytest.raises(ValueError, match=r"world_size must be None or 1 .* accelerate .* got 2"):
        next(iter(sampler))
    sampler.batch_sampler = ClassUniformSampler(UNEVEN, 7, 2)
    sampler.batch_size = 14
    with process_group(0, 2), pytest.raises(ValueError, match=r"classes must be a multiple of the 2 .* got 7"):
        next(iter(sampler))


@pytest.mark.parametrize(
    ("split", "classes", "message"),
    [
        (False, 2, "batches of an epoch must be a multiple of the 2 .* got 13: .* dispatch_batches=False"),
        (True, 5, "classes must be a multiple of the 2 processes .* split_batches .* got 5"),
    ],
)
def test_accelerate_must_not_dispatch_pieces_of_a_class(split, classes, message):
    data_loader = pytest.importorskip("accelerate.data_loader")
    pytest.importorskip("accelerate").PartialState(cpu=True)
    sampler = ClassUniformSampler(UNEVEN, classes, 3)
    loader = data_loader.DataLoaderDispatcher(range(len(UNEVEN)), split_batches=split, batch_sampler=sampler)
    loader.state = types.SimpleNamespace(num_processes=2, process_index=1)  # the process that draws nothing
    with pytest.raises(ValueError, match=message):
        next(iter(loader))


# Resuming -------------------------------------------------------------------------------------------------------------


def examples() -> ClassUniformSampler:
    return ClassUniformSampler(UNEVEN, 3, 2, seed=3)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 1, 5, -1])
def test_resuming(done, position):
    """The run draws the rest of the epoch, and the epochs after it."""
    sampler, expected = examples(), examples()
    for _ in range(done):
        assert epoch(sampler) == epoch(expected)
    rest, batches = iter(expected), iter(sampler)
    for _ in range(position % (len(sampler) + 1)):
        assert next(batches) == next(rest)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = ClassUniformSampler(UNEVEN, 3, 2, seed=8)
    resumed.load_state_dict(state)
    iter(resumed)  # a loader may drop an iterator, and make another
    assert list(resumed) == list(rest)
    assert [epoch(resumed) for _ in range(2)] == [epoch(expected) for _ in range(2)]


def test_resuming_where_epochs_are_set():
    expected, resumed = examples(), examples()
    expected.set_epoch(4)
    batches = iter(expected)
    next(batches)
    state = expected.state_dict()
    for call in ("before", "after"):
        if call == "before":
            resumed.set_epoch(4)
        resumed.load_state_dict(state)
        if call == "after":
            resumed.set_epoch(4)
        assert list(resumed) == epoch(expected)[1:]
        assert epoch(resumed) == epoch(expected)
    resumed.load_state_dict(state)
    resumed.set_epoch(5)
    expected.set_epoch(5)
    assert epoch(resumed) == epoch(expected)


def test_a_state_of_other_batches_is_refused():
    sampler = examples()
    next(iter(sampler))
    other = ClassUniformSampler(UNEVEN, 2, 2)
    other.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match=f"of an epoch of {len(other)} batches, got {len(sampler)}: labels, classes"):
        next(iter(other))


def test_a_sampler_can_be_copied_in_the_middle_of_an_epoch():
    sampler = examples()
    batches = iter(sampler)
    next(batches)
    copies = copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))
    rest = list(batches)
    for copied in copies:
        copied.load_state_dict(copied.state_dict())
        assert list(copied) == rest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("position", [0, 4, -1])
def test_resuming_a_stateful_data_loader(workers, done, position):
    """Its workers fetch batches ahead. Its state belongs to the batches that the loop has received."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> DataLoader:
        return torchdata.StatefulDataLoader(
            range(len(UNEVEN)), batch_sampler=examples(), num_workers=workers, collate_fn=list
        )

    expected = examples()
    interrupted, resumed = loader(), loader()
    for _ in range(done):
        assert list(interrupted) == epoch(expected)
    rest, batches = iter(expected), iter(interrupted)
    for _ in range(position % (len(expected) + 1)):
        assert next(batches) == next(rest)
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    assert list(resumed) == list(rest)
    assert [list(resumed) for _ in range(2)] == [epoch(expected) for _ in range(2)]


def test_resuming_a_stateful_data_loader_between_epochs():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 2):
        settings = {"num_workers": workers, "collate_fn": list}
        finished, resumed = (
            torchdata.StatefulDataLoader(range(len(UNEVEN)), batch_sampler=examples(), **settings) for _ in range(2)
        )
        expected = examples()
        assert list(finished) == epoch(expected)
        resumed.load_state_dict(finished.state_dict())
        assert list(resumed) == epoch(expected)


# Superclasses ---------------------------------------------------------------------------------------------------------


def clouds(sizes: list[int]) -> torch.Tensor:
    """Return points around the corners of a simplex, far apart."""
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


def test_the_state_of_superclasses_holds_them():
    features = clouds([10, 12, 14])
    sampler = SuperclassUniformSampler(features, 3, 2)
    order = torch.randperm(36)
    sampler.recluster(features[order])
    batches = iter(sampler)
    next(batches)
    resumed = SuperclassUniformSampler(features, 3, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(batches)


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((None, 2), {}, TypeError, "labels must hold the class of every example, got None"),
        (("ab", 2), {}, TypeError, "labels must hold the class of every example, in order, got str"),
        (({"a": 1}, 2), {}, TypeError, "labels must hold the class of every example, in order, got dict"),
        ((7, 2), {}, TypeError, "labels must hold the class of every example, in order, got int"),
        (([[0], [1]], 2), {}, TypeError, r"labels must be hashable, got \[0\]"),
        (([0.0, 1.0], 2), {}, TypeError, "labels must be integers, got float"),
        ((np.ones(8), 2), {}, TypeError, "labels must be integers, got float64; strings and other"),
        ((torch.zeros(8, device="meta"), 2), {}, ValueError, "labels must hold values, got a tensor on the meta"),
        ((torch.ones(8), 2), {}, TypeError, "labels must be integers, got torch.float32"),
        ((torch.ones(8, 2).long(), 2), {}, ValueError, r"labels must have shape n.*got \(8, 2\)"),
        (([], 2), {}, ValueError, r"labels must have shape n, n > 0, got \(0,\)"),
        ((torch.tensor([0, 0, 1, 1, -1]), 2, 2), {}, ValueError, "samples must be at most .* class -1 has 1"),
        ((EVEN, 11), {}, ValueError, "classes must be at most the 10 there are, got 11"),
        ((EVEN, 0), {}, ValueError, "classes must be a positive integer, got 0"),
        ((EVEN, 2, 0), {}, ValueError, "samples must be a positive integer, got 0"),
        ((UNEVEN, 2, 5), {}, ValueError, "samples must be at most .* got 5, and class 0 has 4"),
        ((EVEN, 2), {"rank": 2, "world_size": 2}, ValueError, "rank must be less than world_size 2, got 2"),
        ((EVEN, 10), {"world_size": 13}, ValueError, "classes must be at most the number .* every rank.* got 10"),
        ((EVEN, 2, True), {}, ValueError, "samples must be a positive integer, got True"),
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
