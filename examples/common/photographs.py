"""Photographs in folders, one per class, as ImageNet comes: read by Pillow as they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.samplers import ClassUniformSampler

from . import parallel
from .data import Dataset

SIDE, MIDDLE = 224, 224 / 256  # MIDDLE of the shorter side is what is seen of a test image
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random part
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

    def __getitem__(self, index: Tensor) -> Files:
        return Files(tuple(self.paths[i] for i in index.tolist()), self.labels[index])


class Photographs(Dataset):
    """A dataset whose ``train`` and ``test`` are ``Files``."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, SIDE, SIDE)

    def batches(self, batch_size: int, seed: int, device: torch.device, **how: Any) -> FileBatches:
        return FileBatches(self, batch_size, seed, device, **how)

    def test_batches(self, device: torch.device, size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in DataLoader(Reader(self.test), batch_size=size, num_workers=WORKERS):
            yield self.normalise(pixels.to(device)), labels.to(device)


class FileBatches:
    """``data.Batches`` of files: a random part of each image, half of them mirrored."""

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
            raise ValueError(f"batch_size={batch_size} is more than the {len(dataset.train)} training images")
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
            Reader(self.dataset.train, seed),
            batch_sampler=[parallel.share(batch).tolist() for batch in batches],
            num_workers=WORKERS,
            pin_memory=self.device.type == "cuda",
        )
        for pixels, labels in loader:
            yield self.dataset.normalise(pixels.to(self.device, non_blocking=True)), labels.to(self.device)


class Reader(torch.utils.data.Dataset):
    """Pixels and labels of files: of a random part, which depends on ``seed`` and the file's number alone, or, without
    a seed, of the middle. A file that is no image, or half of one, raises a ``ValueError`` that names it."""

    def __init__(self, files: Files, seed: int | None = None) -> None:
        self.files = files
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path = self.files.paths[number]
        try:
            pixels = self._pixels(path, number)
        except Exception as error:  # Pillow's own are of many kinds
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.files.labels[number]

    def _pixels(self, path: Path, number: int) -> np.ndarray:
        from PIL import Image

        mirrored = False
        with Image.open(path) as image:
            if self.seed is None:
                box = middle(*image.size)
            else:
                random = np.random.default_rng((self.seed, number))
                box, mirrored = random_part(*image.size, random), random.random() < 0.5
            pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        return pixels[:, ::-1] if mirrored else pixels


def middle(width: int, height: int) -> Box:
    side = MIDDLE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_part(width: int, height: int, random: np.random.Generator) -> Box:
    """A part of random area, ratio of width to height, and place, as is usual for ImageNet."""
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return middle(width, height)


def photographs(root: Path | None) -> Photographs:
    """ImageNet, or anything in its shape: ``root``/train and ``root``/val hold one folder of images per class.

    Raises:
        FileNotFoundError, ValueError: naming the folder and what is wrong with it.
    """
    if root is None:
        raise ValueError("--data imagenet needs --root: the folder holding train and val, each with a folder per class")
    (train, classes), (test, others) = (read_folder(Path(root) / part) for part in ("train", "val"))
    if classes != others:
        only = sorted(set(classes) ^ set(others))
        raise ValueError(
            f"{root}/train and {root}/val must hold the same classes, got {', '.join(only[:5])} in one only"
        )
    return Photographs(train, test, classes, torch.tensor(MEAN), torch.tensor(STD), padding=0, flip=True)


def read_folder(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """Its images and the names of its folders, the classes, in their order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; it must hold a folder of images per class")
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    paths, labels = [], []
    for label, name in enumerate(classes):
        own = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(f"{folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        paths += own
        labels += [label] * len(own)
    if not classes:
        raise ValueError(f"{folder} holds no folder; it must hold a folder of images per class")
    return Files(tuple(paths), torch.tensor(labels)), classes
