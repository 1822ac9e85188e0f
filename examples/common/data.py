"""Labelled images by the name of their data set. Small ones are kept in memory as bytes, photographs in their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.samplers import ClassUniformSampler

from . import formats, parallel
from .formats import CIFAR10, CIFAR100, Cifar


class DataError(ValueError):
    """A data set does not have what the caller needs."""


@dataclass(frozen=True)
class Images:
    """``pixels`` is uint8, n x c x h x w; ``labels`` is int64, n."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training and test images, and the augmentation of training images: random crops after a border of ``padding``
    zeros, and mirroring with ``flip``.
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    padding: int
    flip: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of an image, c x h x w."""
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
        """Return batches of training images. ``how`` are the arguments of ``Batches``."""
        return Batches(self, batch_size, seed, device, **how)

    def pixels(self, images: Images) -> Tensor:
        """Return the pixels of some images of this dataset, uint8, without augmentation."""
        return images.pixels

    def views(self, images: Images, device: torch.device, size: int = 1000) -> Iterator[Tensor]:
        """Yield the images in batches, normalised, without augmentation, on the device."""
        for start in range(0, len(images), size):
            yield self.normalise(self.pixels(images[start : start + size]).to(device))

    def test_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images, normalised, with their labels, on the device."""
        start = 0
        for images in self.views(self.test, device):
            yield images, self.test.labels[start : start + len(images)].to(device)
            start += len(images)

    def hold_out(self, share: float = 0.2) -> Dataset:
        """Return the dataset with a share of its training images in place of the test images, to choose settings."""
        kept, held = split(self.train.labels, 1 - share)
        return replace(self, train=self.train[kept], test=self.train[held])

    def of_classes(self, classes: Sequence[int]) -> Dataset:
        """Return the dataset with only these classes, numbered in their order."""
        names = tuple(self.class_names[label] for label in classes)
        train, test = (self.renumbered(images, classes) for images in (self.train, self.test))
        return replace(self, train=train, test=test, class_names=names)

    def renumbered(self, images: Images, classes: Sequence[int]) -> Images:
        """Return the images of these classes, which are numbered in their order."""
        numbers = torch.full((self.num_classes,), -1)
        numbers[list(classes)] = torch.arange(len(classes))
        kept = (numbers[images.labels] >= 0).nonzero()[:, 0]
        return replace(images[kept], labels=numbers[images.labels[kept]])

    def only(self, share: float) -> Dataset:
        """Return the dataset with a share of its training images."""
        return replace(self, train=self.train[split(self.train.labels, share)[0]])

    def numbered(self) -> Dataset:
        """Return the dataset, where the label of a training image is its number."""
        return replace(self, train=replace(self.train, labels=torch.arange(len(self.train))))

    def mislabelled(self, share: float, seed: int = 0) -> Dataset:
        """Return the dataset, where a share of the training images has the label of another class."""
        generator = torch.Generator().manual_seed(seed)
        labels = self.train.labels.clone()
        wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
        labels[wrong] += torch.randint(1, self.num_classes, (len(wrong),), generator=generator)
        return replace(self, train=replace(self.train, labels=labels % self.num_classes))


def split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the indices of two parts. The first part is a ``share`` of every class, at least one image."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in labels.unique():
        members = order[labels[order] == label]
        count = max(1, round(share * len(members)))
        parts[0].append(members[:count])
        parts[1].append(members[count:])
    return torch.cat(parts[0]).sort().values, torch.cat(parts[1]).sort().values


class Batches:
    """Shuffled, augmented, normalised batches of training images. An epoch depends only on ``seed`` and its number.

    The last, smaller batch is dropped, because a pair of images would have another weight in its loss.
    ``drop_last=False`` keeps it. A ``sampler`` composes the batches instead.
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
        """Yield normalised float images and labels on the device: this process's share of each batch."""
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
    """Return a window of ``side`` pixels at a random place of each image. With ``flip``, half of the windows are
    mirrored.
    """
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


SMALL = ("digits", "fashion-mnist")  # the demo's recipe fits these; the papers' recipes fit the others
SETS = (*SMALL, "cifar10", "cifar100", "svhn", "stl10", "tiny-imagenet", "imagenet")
PEOPLE = ("market1501", "msmt17", "faces")  # only for tasks that find people
# The default recipes of the examples, "paper" for the other sets.
RECIPES = dict.fromkeys(SMALL, "demo") | {"imagenet": "imagenet", "faces": "faces"}
RECIPES |= dict.fromkeys(("market1501", "msmt17"), "persons")
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip


STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
# The files in --root, and where to get them.
ROOTS = {
    "cifar10": f"data_batch_1.bin and the other files of {CIFAR10.url}",
    "cifar100": f"train.bin and test.bin of {CIFAR100.url}",
    "svhn": f"train_32x32.mat and test_32x32.mat of {formats.SVHN_URL}",
    "stl10": f"the folder stl10_binary of {formats.STL10_URL}",
    "tiny-imagenet": "train and val of http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "imagenet": "train and val, each with a folder per class, as in ILSVRC 2012 of https://image-net.org",
    "market1501": "the unpacked Market-1501-v15.09.15.zip of https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
    "msmt17": "the lists and images of MSMT17 of http://www.pkuvmc.com/publications/msmt17.html",
    "faces": "train and probes with a folder per person, such as MS-Celeb-1M and FaceScrub, and distractors, such as "
    "MegaFace of http://megaface.cs.washington.edu",
}


def load(name: str, root: Path | None = None, *, checked: bool = True) -> Dataset:
    """Return the dataset of ``SETS`` or ``PEOPLE`` with this name. Its files are in ``root``.

    Args:
        checked: whether files must have the published MD5 sums.

    Raises:
        OSError, ValueError: naming a file that is missing or wrong, and what to do.
    """
    if name == "digits":
        return digits()
    if name == "fashion-mnist":
        return fashion_mnist(root)
    if root is None:
        raise ValueError(f"--data {name} needs --root: the folder holding {ROOTS[name]}")
    try:
        return _official(name, Path(root), checked)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; --root must be the folder holding {ROOTS[name]}") from error


def _official(name: str, root: Path, checked: bool) -> Dataset:
    # Imported when they are needed, because they import this module.
    from . import people, photographs

    if name in PEOPLE:
        return getattr(people, name)(root)
    if name == "tiny-imagenet":
        return photographs.tiny_imagenet(root)
    if name == "imagenet":
        return photographs.photographs(root)
    if name in ("svhn", "stl10"):
        return arrays(name, root, checked)
    return cifar(root, {"cifar10": CIFAR10, "cifar100": CIFAR100}[name], checked)


def digits(side: int = 12, canvas: int = 16, test_share: float = 1 / 3) -> Dataset:
    """Return scikit-learn's 1797 handwritten digits, enlarged from 8 x 8 pixels, each at its own place on an empty
    canvas.

    As in photographs, the place of the object does not depend on its class, and part of the image is background.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / bunch.images.max())
    large = F.interpolate(small, size=side, mode="bilinear").round().to(torch.uint8)
    bordered = F.pad(large, [canvas - side] * 4)
    pixels = crop(bordered, canvas, torch.Generator().manual_seed(0))
    images = Images(pixels, torch.from_numpy(bunch.target).long())
    test, train = split(images.labels, test_share)
    return in_memory(images[train], images[test], tuple(map(str, bunch.target_names)), padding=2, flip=False)


def fashion_mnist(root: Path | None = None) -> Dataset:
    """Return Fashion-MNIST from its official files in ``root``. The default is the folder of Debian's package.

    The images of 28 x 28 pixels get a border of two zeros, because the networks are made for 32 x 32 pixels.
    """
    parts = (formats.read_fashion_mnist(Path(root or formats.FASHION_MNIST_FOLDER), part) for part in ("train", "t10k"))
    train, test = (
        Images(F.pad(torch.from_numpy(pixels.copy())[:, None], [2] * 4), torch.from_numpy(labels))
        for pixels, labels in parts
    )
    return in_memory(train, test, FASHION_MNIST_CLASSES, padding=2, flip=True)


def cifar(root: Path, version: Cifar, checked: bool = True) -> Dataset:
    """Return CIFAR from the official files: see ``formats.read_cifar``."""
    read = [torch.from_numpy(array) for array in formats.read_cifar(root, version, checked=checked)]
    names = formats.read_cifar_names(root, version, checked=checked)
    return in_memory(Images(*read[:2]), Images(*read[2:]), names, padding=4, flip=True)


def arrays(name: str, root: Path, checked: bool = True) -> Dataset:
    """Return SVHN, whose digits are not mirrored, or STL-10 with its labelled images."""
    read = formats.read_svhn if name == "svhn" else formats.read_stl10
    train, test = (Images(*map(torch.from_numpy, read(root, part, checked=checked))) for part in ("train", "test"))
    if name == "svhn":
        return in_memory(train, test, tuple("0123456789"), padding=4, flip=False)
    return in_memory(train, test, STL10_CLASSES, padding=12, flip=True)


def in_memory(train: Images, test: Images, class_names: tuple[str, ...], *, padding: int, flip: bool) -> Dataset:
    """Return a dataset, with the mean and the deviation of its training pixels."""
    # In parts, because CIFAR-100 as floats takes four times its size.
    parts = train.pixels.split(1000)
    numbers = train.pixels.numel() / train.pixels.shape[1]
    mean = torch.stack([part.double().sum((0, 2, 3)) for part in parts]).sum(0) / numbers
    square = torch.stack([part.double().square().sum((0, 2, 3)) for part in parts]).sum(0) / numbers
    std = (square - mean.square()).sqrt()
    return Dataset(train, test, class_names, (mean / 255).float(), (std / 255).float(), padding, flip)
