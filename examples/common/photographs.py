"""Photographs in files, such as ImageNet's. Pillow reads them when they are needed, and small ones at the start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from kdkernels.samplers import ClassUniformSampler

from . import parallel
from .data import DataError, Dataset, Images, in_memory

SIDE, MIDDLE = 224, 224 / 256  # a test image is cropped to MIDDLE of its shorter side
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random crop
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp"}
WORKERS = 8

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Files:
    """Image files with their labels, int64, n."""

    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Files:
        chosen = torch.arange(len(self))[index]
        return replace(self, paths=tuple(self.paths[i] for i in chosen.tolist()), labels=self.labels[chosen])


@dataclass(frozen=True)
class Photographs(Dataset):
    """A dataset whose ``train`` and ``test`` are ``Files``.

    Args:
        size: height and width of images that are resized whole, to which ``padding`` applies. By default, a part of
            each photograph is resized to SIDE x SIDE.
    """

    size: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, *(self.size or (SIDE, SIDE)))

    def reader(self, files: Files, seed: int | None = None) -> Reader:
        return Reader(files, seed, self.size, self.padding)

    def batches(self, batch_size: int, seed: int, device: torch.device, **how: Any) -> FileBatches:
        return FileBatches(self, batch_size, seed, device, **how)

    def pixels(self, images: Files) -> Tensor:
        reader = self.reader(images)
        return torch.stack([reader[number][0] for number in range(len(images))])

    def views(self, images: Files, device: torch.device, size: int = 250) -> Iterator[Tensor]:
        for pixels, _ in DataLoader(self.reader(images), batch_size=size, num_workers=WORKERS):
            yield self.normalise(pixels.to(device))


class FileBatches:
    """``data.Batches`` of files: a random crop of each image, half of them mirrored."""

    def __init__(
        self,
        dataset: Photographs,
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
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.drop_last = drop_last
        self.sampler = sampler

    def __len__(self) -> int:
        if self.sampler is not None:
            return len(self.sampler)
        whole, rest = divmod(len(self.dataset.train), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels, on the device: this process's share of each batch."""
        seed = self.seed * 1_000_003 + number
        if self.sampler is None:
            order = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(seed))
            batches = order.split(self.batch_size)[: len(self)]
        else:
            self.sampler.set_epoch(number)
            batches = map(torch.tensor, self.sampler)
        loader = DataLoader(
            self.dataset.reader(self.dataset.train, seed),
            batch_sampler=[parallel.share(batch).tolist() for batch in batches],
            num_workers=WORKERS,
            pin_memory=self.device.type == "cuda",
        )
        for pixels, labels in loader:
            yield self.dataset.normalise(pixels.to(self.device, non_blocking=True)), labels.to(self.device)


class Reader(torch.utils.data.Dataset):
    """Pixels and labels of files. A crop is random and depends only on ``seed`` and the index of the file. Without a
    seed, it is the middle. A file that is not a complete image raises a ``ValueError`` that names it.

    Args:
        size: as of ``Photographs``. Then a crop is a window of the image with a border of ``padding`` zeros.
    """

    def __init__(
        self, files: Files, seed: int | None = None, size: tuple[int, int] | None = None, padding: int = 0
    ) -> None:
        self.files = files
        self.seed = seed
        self.size = size
        self.padding = padding

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path = self.files.paths[number]
        try:
            pixels = self._pixels(path, number)
        except Exception as error:  # Pillow raises exceptions of many types
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.files.labels[number]

    def _pixels(self, path: Path, number: int) -> np.ndarray:
        from PIL import Image

        random = None if self.seed is None else np.random.default_rng((self.seed, number))
        with Image.open(path) as image:
            if self.size is not None:
                box = None
            elif random is None:
                box = middle(*image.size)
            else:
                box = random_part(*image.size, random)
            height, width = self.size or (SIDE, SIDE)
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, box))
        if random is None:
            return pixels
        if self.padding:
            top, left = random.integers(2 * self.padding + 1, size=2)
            bordered = np.pad(pixels, [(self.padding,) * 2] * 2 + [(0, 0)])
            pixels = bordered[top : top + height, left : left + width]
        return pixels[:, ::-1] if random.random() < 0.5 else pixels


def middle(width: int, height: int) -> Box:
    side = MIDDLE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_part(width: int, height: int, random: np.random.Generator) -> Box:
    """Return a crop with random area, aspect ratio and place, as is usual for ImageNet."""
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return middle(width, height)


def photographs(root: Path) -> Photographs:
    """Return ImageNet, or a dataset with its layout: ``root``/train and ``root``/val have one folder of images per
    class.

    Raises:
        FileNotFoundError, ValueError: naming the folder and what is wrong with it.
    """
    (train, classes), (test, others) = (read_folder(Path(root) / part) for part in ("train", "val"))
    if classes != others:
        only = sorted(set(classes) ^ set(others))
        raise ValueError(
            f"{root}/train and {root}/val must hold the same classes, got {', '.join(only[:5])} in one only"
        )
    return Photographs(train, test, classes, torch.tensor(MEAN), torch.tensor(STD), padding=0, flip=True)


def read_folder(folder: Path, inside: str = "") -> tuple[Files, tuple[str, ...]]:
    """Return the images of a folder, and the classes, which are the sorted names of its folders. Images are in the
    folder ``inside`` of each.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; it must hold a folder of images per class")
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    paths, labels = [], []
    for label, name in enumerate(classes):
        place = folder / name / inside
        own = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES) if place.is_dir() else []
        if not own:
            raise ValueError(f"{place} holds no image ({', '.join(sorted(SUFFIXES))})")
        paths += own
        labels += [label] * len(own)
    if not classes:
        raise ValueError(f"{folder} holds no folder; it must hold a folder of images per class")
    return Files(tuple(paths), torch.tensor(labels)), classes


TINY_SIDE = 64


def tiny_imagenet(root: Path) -> Dataset:
    """Return Tiny-ImageNet: ``root``/train/CLASS/images and ``root``/val/images with ``val_annotations.txt``. Its test
    images have no labels, so the validation images are the test images here.

    Raises:
        OSError, ValueError: naming the file or folder and what is wrong with it.
    """
    root = Path(root)
    if not (root / "train").exists() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    train, classes = read_folder(root / "train", inside="images")
    path = root / "val" / "val_annotations.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold a line with name and class of each image")
    labels, paths, numbers = [], [], {name: label for label, name in enumerate(classes)}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, rest = line.partition("\t")
        label = numbers.get(rest.partition("\t")[0])
        if label is None:
            raise ValueError(f"{path} must hold a name, a tab and a class of train, got {line[:80]!r} in line {number}")
        paths.append(root / "val" / "images" / name)
        labels.append(label)
    if not paths:
        raise ValueError(f"{path} holds no line")
    test = Files(tuple(paths), torch.tensor(labels))
    names = _names_of(root / "words.txt", classes)
    return in_memory(*(_decoded(files, TINY_SIDE) for files in (train, test)), names, padding=8, flip=True)


def _names_of(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the words of the classes; the classes if the file does not exist."""
    if not path.is_file():
        return tuple(classes)
    words = dict(line.split("\t", 1) for line in path.read_text().splitlines() if "\t" in line)
    return tuple(words.get(name, name).partition(",")[0] for name in classes)


def _decoded(files: Files, side: int) -> Images:
    """Return all pixels of square images."""

    def read(path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # Pillow raises exceptions of many types
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if pixels.shape != (side, side, 3):
            raise ValueError(f"{path} must have {side} x {side} pixels, got {pixels.shape[1]} x {pixels.shape[0]}")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    pixels = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    bar = tqdm(files.paths, desc="reading images", leave=False, disable=parallel.rank() > 0 or None)
    with ThreadPoolExecutor(WORKERS or 1) as threads:
        for number, image in enumerate(threads.map(read, bar)):
            pixels[number] = image
    return Images(pixels, files.labels)
