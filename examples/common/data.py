"""Labelled images, kept in memory as bytes: scikit-learn's handwritten digits, and CIFAR-100 from its binary files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.samplers import ClassUniformSampler

from . import parallel


class DataError(ValueError):
    """A data set does not have what is asked of it."""


@dataclass(frozen=True)
class Images:
    """``pixels`` is uint8, n x c x h x w; ``labels`` is int64, n."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training and test images, and how training images vary: random crops from the image in a border of ``padding``
    zeros and, with ``flip``, mirroring."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    padding: int
    flip: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: c x h x w."""
        return tuple(self.train.pixels.shape[1:])

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (value.to(pixels.device)[:, None, None] for value in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def batches(self, batch_size: int, seed: int, device: torch.device, **how: Any) -> Batches:
        """Training images; ``how`` is that of ``Batches``."""
        return Batches(self, batch_size, seed, device, **how)

    def test_batches(self, device: torch.device, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, normalised, with their labels, on the device."""
        for pixels, labels in zip(self.test.pixels.split(size), self.test.labels.split(size), strict=True):
            yield self.normalise(pixels.to(device)), labels.to(device)

    def hold_out(self, share: float = 0.2) -> Dataset:
        """The dataset with a share of its training images in place of the test images, for choosing settings."""
        kept, held = split(self.train.labels, 1 - share)
        return replace(self, train=self.train[kept], test=self.train[held])

    def of_classes(self, classes: Sequence[int]) -> Dataset:
        """The dataset with these classes alone, numbered anew in their order."""

        def those(images: Images) -> Images:
            numbers = torch.full((self.num_classes,), -1)
            numbers[list(classes)] = torch.arange(len(classes))
            labels = numbers[images.labels]
            return Images(images.pixels[labels >= 0], labels[labels >= 0])

        names = tuple(self.class_names[label] for label in classes)
        return replace(self, train=those(self.train), test=those(self.test), class_names=names)

    def only(self, share: float) -> Dataset:
        """The dataset with a share of its training images."""
        return replace(self, train=self.train[split(self.train.labels, share)[0]])

    def mislabelled(self, share: float, seed: int = 0) -> Dataset:
        """The dataset with a share of its training images labelled as any other class."""
        generator = torch.Generator().manual_seed(seed)
        labels = self.train.labels.clone()
        wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
        labels[wrong] += torch.randint(1, self.num_classes, (len(wrong),), generator=generator)
        return replace(self, train=replace(self.train, labels=labels % self.num_classes))


def split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of two parts, the first a ``share`` of every class (at least one image)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in labels.unique():
        members = order[labels[order] == label]
        count = max(1, round(share * len(members)))
        parts[0].append(members[:count])
        parts[1].append(members[count:])
    return torch.cat(parts[0]).sort().values, torch.cat(parts[1]).sort().values


class Batches:
    """Shuffled, varied, normalised batches of training images. An epoch depends on ``seed`` and its number alone.

    The last, smaller batch is left out: the loss of a pair of images would weigh differently in it. With
    ``drop_last=False`` it is not. A ``sampler`` composes the batches instead.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        drop_last: bool = True,
        sampler: ClassUniformSampler | None = None,
    ) -> None:
        if len(dataset.train) < batch_size:
            raise DataError(f"batch_size={batch_size} is more than the {len(dataset.train)} training images")
        self.dataset = dataset
        self.images = Images(dataset.train.pixels.to(device), dataset.train.labels.to(device))
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.sampler = sampler

    def __len__(self) -> int:
        if self.sampler is not None:
            return len(self.sampler)
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised float images and labels, on the device: this process's share of each batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        for index in self._indices(number, generator):
            batch = self.images[index.to(self.images.labels.device)]
            bordered = F.pad(batch.pixels, [self.dataset.padding] * 4)
            pixels = crop(bordered, batch.pixels.shape[-1], generator, flip=self.dataset.flip)
            yield self.dataset.normalise(parallel.share(pixels)), parallel.share(batch.labels)

    def _indices(self, number: int, generator: torch.Generator) -> Iterator[Tensor]:
        if self.sampler is None:
            order = torch.randperm(len(self.images), generator=generator)
            yield from order.split(self.batch_size)[: len(self)]
        else:
            self.sampler.set_epoch(number)
            yield from map(torch.tensor, self.sampler)


def crop(pixels: Tensor, side: int, generator: torch.Generator, *, flip: bool = False) -> Tensor:
    """A window of ``side`` pixels at a random place of each image; with ``flip``, half of them mirrored."""
    count, _, height, width = pixels.shape
    top = torch.randint(height - side + 1, (count, 1), generator=generator)
    left = torch.randint(width - side + 1, (count, 1), generator=generator)
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    index = (value.to(pixels.device) for value in (image, rows[:, :, None], columns[:, None, :]))
    return pixels.permute(0, 2, 3, 1)[tuple(index)].permute(0, 3, 1, 2)


def load(name: str, root: Path | None = None) -> Dataset:
    """The dataset called "digits", "cifar100" or "imagenet"; the latter two from ``root``."""
    if name == "digits":
        return digits()
    if name == "imagenet":
        from .photographs import photographs

        return photographs(root)
    if root is None:
        raise ValueError(f"--data cifar100 needs --root: the folder holding train.bin and test.bin of {CIFAR100_URL}")
    return cifar100(root)


def digits(side: int = 12, canvas: int = 16, test_share: float = 1 / 3) -> Dataset:
    """scikit-learn's 1797 handwritten digits, enlarged from 8 x 8 pixels and each at its own place of an empty canvas.

    As in photographs, where the object is says nothing of what it is, and part of the image is background.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / bunch.images.max())
    large = F.interpolate(small, size=side, mode="bilinear").round().to(torch.uint8)
    bordered = F.pad(large, [canvas - side] * 4)
    pixels = crop(bordered, canvas, torch.Generator().manual_seed(0))
    images = Images(pixels, torch.from_numpy(bunch.target).long())
    test, train = split(images.labels, test_share)
    return _dataset(images[train], images[test], tuple(map(str, bunch.target_names)), padding=2, flip=False)


CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
CIFAR100_COUNTS = {"train.bin": 50_000, "test.bin": 10_000}
COARSE_CLASSES, FINE_CLASSES, SIDE = 20, 100, 32
RECORD = 2 + 3 * SIDE * SIDE


def cifar100(root: Path) -> Dataset:
    """CIFAR-100 from its official binary version, train.bin and test.bin in ``root`` or its folder cifar-100-binary."""
    root = Path(root)
    if not (root / "train.bin").exists() and (root / "cifar-100-binary").is_dir():
        root = root / "cifar-100-binary"
    train, test = (read_cifar100(root / name) for name in CIFAR100_COUNTS)
    return _dataset(train, test, _fine_names(root / "fine_label_names.txt"), padding=4, flip=True)


def read_cifar100(path: Path) -> Images:
    """Records of one coarse label, one fine label and 3 x 32 x 32 pixels, a byte each.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; unpack {CIFAR100_URL} there")
    raw = np.fromfile(path, dtype=np.uint8)
    count, rest = divmod(len(raw), RECORD)
    if rest or not count:
        raise ValueError(
            f"{path} is truncated or not CIFAR-100's binary version: expected records of {RECORD} bytes, "
            f"got {count} of them and {rest} bytes more"
        )
    records = raw.reshape(count, RECORD)
    for column, what, classes in ((0, "coarse", COARSE_CLASSES), (1, "fine", FINE_CLASSES)):
        wrong = np.flatnonzero(records[:, column] >= classes)
        if len(wrong):
            raise ValueError(
                f"{path} is corrupt: record {wrong[0]} has {what} label {records[wrong[0], column]}, "
                f"expected 0 to {classes - 1}"
            )
    expected = CIFAR100_COUNTS.get(path.name, count)
    if count != expected:
        warnings.warn(f"{path} holds {count} images where the official file holds {expected}", stacklevel=2)
    pixels = torch.from_numpy(records[:, 2:].reshape(count, 3, SIDE, SIDE).copy())
    return Images(pixels, torch.from_numpy(records[:, 1].astype(np.int64)))


def _fine_names(path: Path) -> tuple[str, ...]:
    """The classes' names; their numbers where the file is not there."""
    if not path.is_file():
        return tuple(map(str, range(FINE_CLASSES)))
    names = tuple(path.read_text(errors="replace").split())
    if len(names) != FINE_CLASSES:
        raise ValueError(f"{path} is truncated or corrupt: expected {FINE_CLASSES} names, got {len(names)}")
    return names


def _dataset(train: Images, test: Images, class_names: tuple[str, ...], *, padding: int, flip: bool) -> Dataset:
    # In parts: CIFAR-100 as floats would take four times its size.
    parts = train.pixels.split(1000)
    numbers = train.pixels.numel() / train.pixels.shape[1]
    mean = torch.stack([part.double().sum((0, 2, 3)) for part in parts]).sum(0) / numbers
    square = torch.stack([part.double().square().sum((0, 2, 3)) for part in parts]).sum(0) / numbers
    std = (square - mean.square()).sqrt()
    return Dataset(train, test, class_names, (mean / 255).float(), (std / 255).float(), padding, flip)
