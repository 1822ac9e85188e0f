"""Batches with several examples of each class (CCKD section 3.5), for ``DataLoader(batch_sampler=...)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from . import checks

__all__ = ["ClassUniformSampler", "SuperclassUniformSampler"]


class ClassUniformSampler(Sampler[list[int]]):
    """The class-uniform random (CUR) sampler: every batch holds ``samples`` examples of each of ``classes`` classes.

    In every epoch each rank draws a share of its own of every class, so that no example comes on two ranks. It cuts the
    shares into groups of ``samples`` examples; a last incomplete group is completed with others of the share. A batch
    takes a group of each of ``classes`` different classes: those with the most groups left, at random among equals, so
    that large and small classes end together. Hence

    - a batch is ``classes`` runs of ``samples`` different examples of one class, each class at most once;
    - every example comes at least once per epoch. An epoch has as many batches as the groups fill, or as the largest
      class has groups if that is more; all ranks have the same number;
    - an example comes again only to complete a group, or where fewer than ``classes`` classes have groups left: the
      others then give groups drawn again at random. Where everything divides evenly each example comes exactly once.

    A class with fewer than ``samples`` examples is an error; a rank's share of a class may be smaller and then repeats
    its examples within a group.

    Args:
        labels: the class of every example of the data set, integers >= 0; each occurs at least ``samples`` times.
        classes: classes per batch.
        samples: k, the examples per class in a batch.
        rank, world_size: of this process. Every rank needs the same seed and epoch.
        seed: of the shuffling, together with the epoch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        classes: int,
        samples: int = 4,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value in (("classes", classes), ("samples", samples), ("world_size", world_size)):
            checks.positive_int(name, value)
        for name, value in (("rank", rank), ("seed", seed)):
            checks.non_negative_int(name, value)
        if rank >= world_size:
            raise ValueError(f"rank must be less than world_size {world_size}, got {rank}")
        self.classes, self.samples = classes, samples
        self.rank, self.world_size = rank, world_size
        self.seed, self.epoch = seed, 0
        self._assign(_check_labels(labels))

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently from other epochs, as with DistributedSampler: call it before each of them."""
        checks.non_negative_int("epoch", epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        common, own = (
            torch.Generator().manual_seed(hash(numbers))  # of integers: the same in every process
            for numbers in ((self.seed, self.epoch), (self.seed, self.epoch, self.rank))
        )
        shares = [
            _shuffled(members, common)[self._first(c, self.rank) :: self.world_size]
            for c, members in enumerate(self._members)
        ]
        groups = [list(self._cut(share)) for share in shares]
        left = torch.tensor([float(len(waiting) or -1) for waiting in groups])
        for _ in range(self._batches):
            chosen = (left + torch.rand(len(left), generator=own)).topk(self.classes).indices
            left[chosen] = (left[chosen] - 1).clamp(min=0)
            batch = [groups[c].pop() if groups[c] else self._cut(_shuffled(shares[c], own))[0] for c in chosen.tolist()]
            yield torch.cat(batch).tolist()

    def _assign(self, labels: Tensor) -> None:
        """Take the classes as they are in ``labels``, and see how many batches they make."""
        self.labels = labels
        values, counts = labels.unique(return_counts=True)
        self._check_counts(values, counts)
        self._members = labels.argsort(stable=True).split(counts.tolist())
        if len(counts) < self.classes:
            raise ValueError(f"classes must be at most the {len(counts)} there are, got {self.classes}")
        self._batches = max(self._batches_of(rank) for rank in range(self.world_size))

    def _check_counts(self, values: Tensor, counts: Tensor) -> None:
        if counts.min() < self.samples:
            raise ValueError(
                f"samples must be at most the number of examples of each class, got {self.samples}, "
                f"and class {values[counts.argmin()].item()} has {counts.min().item()}"
            )

    def _batches_of(self, rank: int) -> int:
        sizes = [
            len(range(self._first(c, rank), len(members), self.world_size)) for c, members in enumerate(self._members)
        ]
        available = sum(size > 0 for size in sizes)
        if available < self.classes:
            raise ValueError(
                f"classes must be at most the number of classes that every rank has a share of, {available}, "
                f"got {self.classes}"
            )
        groups = [-(-size // self.samples) for size in sizes]
        return max(-(-sum(groups) // self.classes), max(groups))

    def _first(self, position: int, rank: int) -> int:
        """Where a rank's share begins in the class at ``position``: not the same rank gets one more of every class."""
        return (rank + position) % self.world_size

    def _cut(self, share: Tensor) -> Tensor:
        """A share in groups: the last is completed from the beginning, and one smaller than a group repeats itself."""
        groups = -(-len(share) // self.samples)
        return share[torch.arange(groups * self.samples) % max(len(share), 1)].view(groups, self.samples)


class SuperclassUniformSampler(ClassUniformSampler):
    """The superclass-uniform random (SUR) sampler: as the class-uniform one, over clusters of a teacher's features.

    Superclasses are found by k-means, which takes scikit-learn. A cluster smaller than ``samples`` is used nevertheless
    and repeats its examples within a batch.

    Args:
        features: n x d, the teacher's for every example of the data set, in its order.
        superclasses: the number of clusters.
        classes, samples, rank, world_size, seed: as in ``ClassUniformSampler``. Every rank needs the same features.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        ImportError: when scikit-learn is not installed.
    """

    def __init__(
        self,
        features: Tensor,
        superclasses: int,
        classes: int,
        samples: int = 4,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        checks.positive_int("superclasses", superclasses)
        checks.non_negative_int("seed", seed)
        self.superclasses = superclasses
        labels = _cluster(features, superclasses, seed)
        super().__init__(labels, classes, samples, rank=rank, world_size=world_size, seed=seed)

    def recluster(self, features: Tensor) -> None:
        """Find the superclasses anew, in features of the same examples: those of a better teacher, say."""
        labels = _cluster(features, self.superclasses, self.seed)
        if len(labels) != len(self.labels):
            raise ValueError(f"features must be of the same {len(self.labels)} examples, got {len(labels)}")
        self._assign(labels)

    def _check_counts(self, values: Tensor, counts: Tensor) -> None:
        """Clusters may be of any size."""


def _check_labels(labels: object) -> Tensor:
    if labels is None:
        raise TypeError(
            "labels must hold the class of every example, got None; SuperclassUniformSampler needs no labels"
        )
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be integers, got {type(labels).__name__}: {error}") from error
    if labels.dim() != 1 or labels.numel() == 0:
        raise ValueError(f"labels must have shape n, n > 0, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(
            f"labels must be >= 0, got {labels.min().item()}: leave unlabelled examples out, "
            "or use SuperclassUniformSampler, which needs no labels"
        )
    return labels.cpu()


def _shuffled(members: Tensor, random: torch.Generator) -> Tensor:
    return members[torch.randperm(len(members), generator=random)]


def _cluster(features: object, superclasses: int, seed: int) -> Tensor:
    """The k-means cluster of every row."""
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
