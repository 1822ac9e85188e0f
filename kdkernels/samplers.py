"""Batches with several examples of each class (CCKD section 3.5), for ``DataLoader(batch_sampler=...)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from itertools import islice
from numbers import Integral, Number
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from . import checks

__all__ = ["ClassUniformSampler", "SuperclassUniformSampler"]


class ClassUniformSampler(BatchSampler):
    """Draw batches with ``samples`` examples of each of ``classes`` classes: the class-uniform random (CUR) sampler.

    A batch has ``classes`` runs of ``samples`` different examples. Each run belongs to one class, and a batch has a
    class at most once. In every epoch, each rank draws its own share of every class, so no example is on two ranks. It
    cuts each share into groups of ``samples`` examples. A batch takes one group of each of ``classes`` classes. The
    classes with the most groups left come first, in random order among equals, so that all classes end at about the
    same time.

    - Every example occurs at least once per epoch. All ranks have the same number of batches: as many as the groups
      fill, or as many as the largest class has groups.
    - An example occurs again only in two cases: it completes a last group, or fewer than ``classes`` classes have
      groups left and the other classes draw groups again. If everything divides evenly, each example occurs exactly
      once.
    - A class with fewer than ``samples`` examples raises an error. With ``replacement``, it repeats its examples within
      a group. A rank's share of a class may be smaller than ``samples``, and then repeats its examples too.

    Each iteration draws the next epoch. After ``set_epoch``, each iteration draws the given epoch until the next call.
    ``state_dict`` and ``load_state_dict`` resume a run in the middle of an epoch. The samplers' page in the
    documentation says how they work with torchdata, Lightning and accelerate.

    Args:
        labels: the class of every example of the data set: a sequence, an array or a tensor of integers, strings or
            other hashable values.
        classes: classes per batch.
        samples: k, the examples per class in a batch.
        rank: the number of this process. None takes it from the process group when an iteration begins, or 0 if there
            is one process.
        world_size: the number of processes. None takes it from the process group, or 1.
        seed: shuffles, together with the epoch. Every rank needs the same seed and epoch.
        replacement: also take classes that have fewer than ``samples`` examples.
        sampler: a DistributedSampler that gives rank and number of processes if they are not given. Lightning's Trainer
            passes one.

    Attributes:
        batch_size: ``classes * samples``.
        drop_last: False, because every batch is full.
        epoch: the epoch that the next iteration draws.
        labels: the position of every example's class in ``values``.
        values: the classes, sorted if they have an order.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a number does not fit the labels, with the same parts in the message.
        RuntimeError: an iteration and ``len`` raise it if there are several processes and no process group yet.

    Memory:
        One integer per example, and per epoch another one.

    Examples:
        >>> import torch
        >>> from kdkernels.samplers import ClassUniformSampler
        >>> labels = torch.arange(10).repeat_interleave(8)
        >>> batches = ClassUniformSampler(labels, classes=5, samples=4)
        >>> len(batches), len(next(iter(batches)))
        (4, 20)
    """

    def __new__(cls, *args: Any, **settings: Any) -> ClassUniformSampler:
        # Lightning rebuilds a batch sampler as cls(sampler, batch_size=, drop_last=) if it did not see it being made.
        if args and isinstance(args[0], Sampler):
            raise TypeError(
                f"labels must hold the class of every example, got {type(args[0]).__name__}: {cls.__name__} cannot be "
                "rebuilt around another sampler. With Lightning, make it inside train_dataloader() or pass "
                "use_distributed_sampler=False to the Trainer; each process draws its own share in either case"
            )
        return super().__new__(cls)

    def __init__(
        self,
        labels: Iterable[Hashable] | Tensor,
        classes: int,
        samples: int = 4,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        replacement: bool = False,
        sampler: object | None = None,
    ) -> None:
        self.classes = checks.positive_int("classes", classes)
        self.samples = checks.positive_int("samples", samples)
        if rank is None and world_size is None:
            rank, world_size = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        self.rank = None if rank is None else checks.non_negative_int("rank", rank)
        self.world_size = None if world_size is None else checks.positive_int("world_size", world_size)
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")
        self.seed = checks.non_negative_int("seed", seed)
        self.replacement = replacement
        self.batch_size = self.classes * self.samples
        self.drop_last = False
        self._next = _Position(0)
        self._at: _Position | None = None  # of the iteration that drew the last batch
        self._pinned = False
        self._assign(labels)

    @property
    def sampler(self) -> ClassUniformSampler:  # type: ignore[override]
        """Return the sampler itself, because trainers call ``batch_sampler.sampler.set_epoch``."""
        return self

    @property
    def epoch(self) -> int:
        return self._next.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch in each iteration until the next call. Call it before every epoch, or never."""
        epoch = checks.non_negative_int("epoch", epoch)
        if epoch != self.epoch:  # or the position that was loaded in this epoch still holds
            self._next = _Position(epoch)
        self._pinned = True

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was drawn: seed, epoch, and the batches of the epoch so far.

        A DataLoader with workers draws batches before it returns them. torchdata's StatefulDataLoader accounts for
        this. With PyTorch's own, set "batches" to the number of batches that were trained on.
        """
        return self._state(self._at or self._next)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after this position in the next iteration."""
        self.seed = state["seed"]
        self._next, self._at = _Position(state["epoch"], state["batches"], state["length"]), None

    def __len__(self) -> int:
        """Return the batches of an epoch on this rank."""
        return self._length(self._place()[1])

    def __iter__(self) -> Iterator[list[int]]:
        return _Iteration(self)

    def _state(self, position: _Position) -> dict[str, Any]:
        return {"seed": self.seed, **position._asdict()}

    def _begin(self) -> _Position:
        """Return where an iteration begins: at a loaded position, or at the beginning of an epoch."""
        position = self._next
        self._next = _Position(position.epoch + (not self._pinned))
        return position

    def _place(self) -> tuple[int, int]:
        """Return the rank of this process, and the number of processes that share the examples."""
        loader = _loader_of_accelerate()
        if loader is not None:
            self._check_loader(loader)
            return 0, 1  # the loader hands out the batches of all processes
        rank, world_size = self.rank, self.world_size
        if rank is None or world_size is None:
            if dist.is_available() and dist.is_initialized():
                rank = dist.get_rank() if rank is None else rank
                world_size = dist.get_world_size() if world_size is None else world_size
            elif rank or (world_size or int(os.environ.get("WORLD_SIZE", "1"))) > 1:
                raise RuntimeError(
                    f"rank and world_size must be known if there are several processes, got {rank} and {world_size}: "
                    "give both, or call torch.distributed.init_process_group first"
                )
            else:
                rank, world_size = 0, 1
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")
        return rank, world_size

    def _check_loader(self, loader: Any) -> None:
        """Check accelerate's settings: it splits batches, and the examples of a class must stay together."""
        if self.world_size not in (None, 1):
            raise ValueError(
                "world_size must be None or 1 with a loader that accelerate prepared, which gives each process its "
                f"part of the batches itself, got {self.world_size}"
            )
        if "split_batches" not in loader.__dict__:  # a dispatcher that is being made, and keeps a first iterator
            return
        dispatches = not hasattr(loader, "num_processes")
        processes = loader.state.num_processes if dispatches else loader.num_processes
        if loader.split_batches:
            if self.classes % processes:
                raise ValueError(
                    f"classes must be a multiple of the {processes} processes that accelerate's split_batches cuts "
                    f"each batch for, got {self.classes}; otherwise it separates the examples of a class"
                )
        elif dispatches and self._length(1) % processes:
            raise ValueError(
                f"the batches of an epoch must be a multiple of the {processes} processes for accelerate's "
                f"dispatch_batches, got {self._length(1)}: it cuts the last batches in pieces and separates the "
                "examples of a class; pass dispatch_batches=False"
            )

    def _draw(self, epoch: int, rank: int, world_size: int) -> Iterator[list[int]]:
        common, own = (
            torch.Generator("cpu").manual_seed(hash(numbers))  # of integers: the same in every process
            for numbers in ((self.seed, epoch), (self.seed, epoch, rank))
        )
        shares = [
            _shuffled(members, common)[_first(c, rank, world_size) :: world_size]
            for c, members in enumerate(self._members)
        ]
        groups = [list(self._cut(share)) for share in shares]
        left = torch.tensor([float(len(waiting) or -1) for waiting in groups], dtype=torch.float32, device="cpu")
        for _ in range(self._length(world_size)):
            chosen = (left + torch.rand(len(left), generator=own, dtype=torch.float32, device="cpu")).topk(self.classes)
            left[chosen.indices] = (left[chosen.indices] - 1).clamp(min=0)
            batch = [
                groups[c].pop() if groups[c] else self._cut(_shuffled(shares[c], own))[0]
                for c in chosen.indices.tolist()
            ]
            yield torch.cat(batch).tolist()

    def _assign(self, labels: object) -> None:
        """Take the classes from ``labels``, and check that they make batches."""
        self.labels, self.values = _numbered(labels)
        counts = self.labels.bincount(minlength=len(self.values))
        self._check_counts(counts)
        self._members = self.labels.argsort(stable=True).split(counts.tolist())
        if len(counts) < self.classes:
            raise ValueError(f"classes must be at most the {len(counts)} there are, got {self.classes}")
        self._lengths: dict[int, int] = {}
        self._length(self.world_size or 1)

    def _check_counts(self, counts: Tensor) -> None:
        few = (counts < self.samples).nonzero()[:, 0].tolist()
        if few and not self.replacement:
            smallest = int(counts.argmin())
            others = f", and {len(few) - 1} other classes have too few" if len(few) > 1 else ""
            raise ValueError(
                f"samples must be at most the number of examples of each class, got {self.samples}, "
                f"and class {self.values[smallest]!r} has {counts[smallest]}{others}; "
                "replacement=True repeats the examples of such a class"
            )

    def _length(self, world_size: int) -> int:
        """Return the batches of an epoch per rank."""
        if world_size not in self._lengths:
            self._lengths[world_size] = max(self._batches_of(rank, world_size) for rank in range(world_size))
        return self._lengths[world_size]

    def _batches_of(self, rank: int, world_size: int) -> int:
        sizes = [
            len(range(_first(c, rank, world_size), len(members), world_size)) for c, members in enumerate(self._members)
        ]
        available = sum(size > 0 for size in sizes)
        if available < self.classes:
            raise ValueError(
                f"classes must be at most the number of classes that every rank has a share of, {available}, "
                f"got {self.classes}"
            )
        groups = [-(-size // self.samples) for size in sizes]
        return max(-(-sum(groups) // self.classes), max(groups))

    def _cut(self, share: Tensor) -> Tensor:
        """Return a share in groups. The first examples complete the last group, and a small share repeats itself."""
        groups = -(-len(share) // self.samples)
        positions = torch.arange(groups * self.samples, device="cpu") % max(len(share), 1)
        return share[positions].view(groups, self.samples)


class SuperclassUniformSampler(ClassUniformSampler):
    """Draw batches as ``ClassUniformSampler`` does, from clusters of a teacher's features: the SUR sampler.

    k-means finds the superclasses, which needs scikit-learn. A cluster with fewer than ``samples`` examples repeats
    them within a batch. ``state_dict`` also holds the superclass of every example.

    Args:
        features: n x d, the teacher's features of every example of the data set, in its order. Every rank needs the
            same features.
        superclasses: the number of clusters.
        classes: superclasses per batch.
        samples: k, the examples per superclass in a batch.
        rank: the number of this process, as in ``ClassUniformSampler``.
        world_size: the number of processes, as in ``ClassUniformSampler``.
        seed: of the clusters and of the shuffling.
        sampler: a DistributedSampler, as in ``ClassUniformSampler``.

    Raises:
        TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it got.
        ValueError: if a number does not fit the features, with the same parts in the message.
        ImportError: if scikit-learn is not installed.

    Memory:
        One integer per example, and per epoch another one. k-means takes a float32 copy of the features on the CPU.

    Examples:
        >>> import torch
        >>> from kdkernels.samplers import SuperclassUniformSampler
        >>> features = torch.randn(80, 16)
        >>> batches = SuperclassUniformSampler(features, superclasses=5, classes=2, samples=4)
        >>> len(next(iter(batches)))
        8
    """

    def __init__(
        self,
        features: Tensor,
        superclasses: int,
        classes: int,
        samples: int = 4,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        sampler: object | None = None,
    ) -> None:
        self.superclasses = checks.positive_int("superclasses", superclasses)
        labels = _cluster(features, self.superclasses, checks.non_negative_int("seed", seed))
        super().__init__(
            labels, classes, samples, rank=rank, world_size=world_size, seed=seed, replacement=True, sampler=sampler
        )

    def recluster(self, features: Tensor) -> None:
        """Find the superclasses again, in new features of the same examples, such as the features of a
        better teacher.
        """
        labels = _cluster(features, self.superclasses, self.seed)
        if len(labels) != len(self.labels):
            raise ValueError(f"features must be of the same {len(self.labels)} examples, got {len(labels)}")
        self._assign(labels)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["labels"] is not self.labels:
            self._assign(state["labels"])

    def _state(self, position: _Position) -> dict[str, Any]:
        return {**super()._state(position), "labels": self.labels}


class _Position(NamedTuple):
    """A place between two batches of an epoch. ``length`` is the number of its batches, None at the beginning."""

    epoch: int
    batches: int = 0
    length: int | None = None


class _Iteration(Iterator[list[int]]):
    """The batches of an epoch. The first ``next`` begins it, because loaders make iterators that they drop."""

    def __init__(self, sampler: ClassUniformSampler) -> None:
        self._sampler = sampler
        self._position: _Position | None = None
        self._batches: Iterator[list[int]] | None = None
        sampler._place()  # raises here, where all processes of accelerate come along, and not where only one draws

    def __next__(self) -> list[int]:
        if self._batches is None:
            self._position, self._batches = self._begin()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._sampler._at = None
            raise
        epoch, drawn, length = cast(_Position, self._position)
        self._position = self._sampler._at = _Position(epoch, drawn + 1, length)
        return batch

    def _begin(self) -> tuple[_Position, Iterator[list[int]]]:
        sampler, place = self._sampler, self._sampler._place()
        length = sampler._length(place[1])
        epoch, skip, expected = self._position or sampler._begin()
        if skip and expected not in (None, length):
            raise ValueError(
                f"the state that was loaded must be of an epoch of {length} batches, got {expected}: "
                "labels, classes, samples and world_size must be as they were when it was saved"
            )
        return _Position(epoch, skip, length), islice(sampler._draw(epoch, *place), skip, None)

    def state_dict(self) -> dict[str, Any]:
        return self._sampler._state(self._position or self._sampler._next)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sampler.load_state_dict(state)
        self._position = self._sampler._begin()


def _loader_of_accelerate() -> Any:
    """Return the object of accelerate that draws batches for all processes, or None if none asks now.

    accelerate does not tell the batch sampler about it. The only sign is that accelerate is among the callers.
    """
    accelerate: Any = sys.modules.get("accelerate.data_loader")
    frame = None if accelerate is None else sys._getframe(1)
    while frame is not None:
        if frame.f_globals is accelerate.__dict__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, (accelerate.BatchSamplerShard, accelerate.DataLoaderDispatcher)):
                return owner
        frame = frame.f_back
    return None


def _numbered(labels: object) -> tuple[Tensor, list[Hashable]]:
    """Return the number of every example's class, and the classes in the order of their numbers."""
    if labels is None:
        raise TypeError(
            "labels must hold the class of every example, got None; SuperclassUniformSampler needs no labels"
        )
    if isinstance(labels, (str, bytes, Mapping, Set)) or not isinstance(labels, Iterable):
        raise TypeError(f"labels must hold the class of every example, in order, got {type(labels).__name__}")
    shape = tuple(getattr(labels, "shape", [None]))
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"labels must have shape n, n > 0, got {shape}")
    if isinstance(labels, Tensor) and labels.is_meta:
        raise ValueError("labels must hold values, got a tensor on the meta device")
    given = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    given = [label.item() if isinstance(label, Tensor) else label for label in given]
    if not given:
        raise ValueError("labels must have shape n, n > 0, got (0,)")
    numbers_of: dict[Hashable, int] = {}
    try:
        for label in given:
            numbers_of.setdefault(label, len(numbers_of))
    except TypeError as error:
        raise TypeError(f"labels must be hashable, got {label!r}") from error
    for label in numbers_of:
        if isinstance(label, Number) and not isinstance(label, Integral):
            dtype = getattr(labels, "dtype", type(label).__name__)
            raise TypeError(f"labels must be integers, got {dtype}; strings and other hashable names are fine as well")
    try:
        values: list[Any] = sorted(numbers_of)
    except TypeError:  # such as integers and strings together, which have no order
        values = list(numbers_of)
    numbers_of = {value: number for number, value in enumerate(values)}
    return torch.tensor([numbers_of[label] for label in given], dtype=torch.int64, device="cpu"), values


def _first(position: int, rank: int, world_size: int) -> int:
    """Return where a rank's share of a class begins. It differs per class, so no rank always gets one more."""
    return (rank + position) % world_size


def _shuffled(members: Tensor, random: torch.Generator) -> Tensor:
    return members[torch.randperm(len(members), generator=random, device="cpu")]


def _cluster(features: object, superclasses: int, seed: int) -> Tensor:
    """Return the k-means cluster of every row."""
    features = checks.tensor("features", features, 2, "n x d").detach()
    if len(features) < superclasses:
        raise ValueError(f"superclasses must be at most the {len(features)} rows of features, got {superclasses}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(f"SuperclassUniformSampler takes scikit-learn (pip install scikit-learn): {error}") from error
    means = KMeans(superclasses, n_init=1, random_state=seed)
    return torch.from_numpy(means.fit_predict(features.float().cpu().numpy())).long()
