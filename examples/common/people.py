"""Persons and faces: images of some people to learn from, and of other people to find.

Market-1501 and MSMT17 have queries and a gallery, with the camera of each image. Faces are in folders: people to learn,
people to find, and distractors, as in MegaFace.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .photographs import MEAN, STD, SUFFIXES, Files, Photographs, read_folder
from .ranking import JUNK

PERSON, FACE = (256, 128), (112, 112)  # height and width; CCKD prints neither
BORDER = 10  # of a person's image, before a random crop
MARKET_NAME = re.compile(r"(-1|\d{4})_c(\d)s\d_\d+_\d+\.jpg(\.jpg)?")  # identity and camera; some query names end twice
MARKET_COUNTS = {"bounding_box_train": 12_936, "query": 3_368, "bounding_box_test": 19_732}
MARKET_FOLDER = "Market-1501-v15.09.15"
MSMT17_COUNTS = {"train": 32_621, "query": 11_659, "gallery": 82_161}


@dataclass(frozen=True)
class Sightings(Files):
    """Files with the identity of the person as label, and the number of the camera, int64, n.

    Junk has the identity -1. Distractors of Market-1501 have the identity 0, which no query has.
    """

    cameras: Tensor

    def __getitem__(self, index: Tensor | slice) -> Sightings:
        return replace(super().__getitem__(index), cameras=self.cameras[index])


@dataclass(frozen=True)
class Persons(Photographs):
    """A dataset whose classes are the persons of ``train``. ``test`` are the queries for ``gallery``, other persons."""

    gallery: Sightings | None = None

    def hold_out(self, share: float = 0.2) -> Persons:
        """Return the dataset with a share of its persons in place of the queries and the gallery, to choose settings.
        Queries are the first image of each person from each camera.
        """
        persons = torch.randperm(self.num_classes, generator=torch.Generator().manual_seed(0))
        held = persons[: max(1, round(share * self.num_classes))]
        to_find = torch.isin(self.train.labels, held)
        gallery = self.train[to_find.nonzero()[:, 0]]
        first: dict[tuple[int, int], int] = {}
        for number, key in enumerate(zip(gallery.labels.tolist(), gallery.cameras.tolist(), strict=True)):
            first.setdefault(key, number)
        queries = gallery[torch.tensor(list(first.values()))]
        rest = learning_from(self, persons[len(held) :].sort().values)
        return replace(rest, test=queries, gallery=gallery)


@dataclass(frozen=True)
class Faces(Photographs):
    """A dataset whose classes are the people of ``train``. ``test`` are the probes, images of other people."""

    distractors: Files | None = None

    def hold_out(self, share: float = 0.2) -> Faces:
        """Return the dataset with a share of its people in place of probes and distractors, to choose settings."""
        people = torch.randperm(self.num_classes, generator=torch.Generator().manual_seed(0))
        held = people[: max(2, round(share * self.num_classes))]
        probes, others = (self.train[torch.isin(self.train.labels, part).nonzero()[:, 0]] for part in held.chunk(2))
        rest = learning_from(self, people[len(held) :].sort().values)
        return replace(rest, test=probes, distractors=others)


Data = TypeVar("Data", Persons, Faces)


def learning_from(dataset: Data, classes: Tensor) -> Data:
    """Return the dataset with only these people to learn from."""
    names = tuple(dataset.class_names[label] for label in classes.tolist())
    return replace(dataset, train=dataset.renumbered(dataset.train, classes.tolist()), class_names=names)


def market1501(root: Path) -> Persons:
    """Return Market-1501 from its folders ``bounding_box_train``, ``query`` and ``bounding_box_test``.

    Raises:
        OSError, ValueError: naming the file or folder and what is wrong with it.
    """
    root = Path(root)
    if not (root / "query").exists() and (root / MARKET_FOLDER).is_dir():
        root = root / MARKET_FOLDER
    train, queries, gallery = (_market_folder(root / name, count) for name, count in MARKET_COUNTS.items())
    for folder, part in (("bounding_box_train", train), ("query", queries)):
        if (part.labels <= 0).any():
            raise ValueError(f"{root / folder} must hold persons 0001 to 1501, got junk or distractors")
    return _persons(train, queries, gallery)


def _market_folder(folder: Path, count: int) -> Sightings:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    paths, identities, cameras = [], [], []
    for path in sorted(folder.glob("*.jpg")):
        found = MARKET_NAME.fullmatch(path.name)
        if found is None:
            raise ValueError(
                f"{path} must have a name such as 0002_c1s1_000451_03.jpg: person, camera, sequence, frame"
            )
        paths.append(path)
        identities.append(int(found[1]))
        cameras.append(int(found[2]))
    if not paths:
        raise ValueError(f"{folder} holds no image")
    _expect(folder, len(paths), count)
    return Sightings(tuple(paths), torch.tensor(identities), torch.tensor(cameras))


def msmt17(root: Path) -> Persons:
    """Return MSMT17 from its lists ``list_train.txt``, ``list_val.txt``, ``list_query.txt`` and ``list_gallery.txt``.

    The networks learn from the images of the first two. The images are in ``train`` and ``test``, in version 2 in
    ``mask_train_v2`` and ``mask_test_v2``.

    Raises:
        OSError, ValueError: naming the file or folder and what is wrong with it.
    """
    root = Path(root)
    for inner in ("MSMT17_V1", "MSMT17_V2"):
        if not (root / "list_train.txt").exists() and (root / inner).is_dir():
            root = root / inner
    train = [_msmt17_list(root, name, "train") for name in ("train", "val")]
    both = Sightings(
        train[0].paths + train[1].paths, *(torch.cat([getattr(t, n) for t in train]) for n in ("labels", "cameras"))
    )
    queries, gallery = (_msmt17_list(root, name, "test") for name in ("query", "gallery"))
    for name, part in (("train", both), ("query", queries), ("gallery", gallery)):
        _expect(root / f"list_{name}.txt", len(part), MSMT17_COUNTS[name])
    return _persons(both, queries, gallery)


def _msmt17_list(root: Path, name: str, part: str) -> Sightings:
    path = root / f"list_{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    folder = next((root / n for n in (part, f"mask_{part}_v2") if (root / n).is_dir()), root / part)
    paths, identities, cameras = [], [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.fullmatch(r"(\S+/\d+_\d+_(\d+)_\S+) (\d+)", line)
        if found is None:
            raise ValueError(
                f"{path} must hold lines such as 0000/0000_000_01_0303morning_0015_0.jpg 0, got {line[:80]!r} in line "
                f"{number}"
            )
        paths.append(folder / found[1])
        cameras.append(int(found[2]))
        identities.append(int(found[3]))
    return Sightings(
        tuple(paths), torch.tensor(identities, dtype=torch.int64), torch.tensor(cameras, dtype=torch.int64)
    )


def _persons(train: Sightings, queries: Sightings, gallery: Sightings) -> Persons:
    """Return the dataset with the persons of ``train`` numbered from 0."""
    persons, labels = train.labels.unique(return_inverse=True)
    return Persons(
        replace(train, labels=labels),
        queries,
        tuple(f"{person:04d}" for person in persons.tolist()),
        torch.tensor(MEAN),
        torch.tensor(STD),
        padding=BORDER,
        flip=True,
        size=PERSON,
        gallery=gallery,
    )


def faces(root: Path) -> Faces:
    """Return faces: ``root``/train and ``root``/probes have one folder per identity, ``root``/distractors has images of
    other people in any folders. The faces are aligned.

    Raises:
        OSError, ValueError: naming the file or folder and what is wrong with it.
    """
    root = Path(root)
    (train, people), (probes, _) = (read_folder(root / part) for part in ("train", "probes"))
    paths = tuple(sorted(path for path in (root / "distractors").rglob("*") if path.suffix.lower() in SUFFIXES))
    if not paths:
        raise FileNotFoundError(f"{root / 'distractors'} holds no image; it must hold faces of other people")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    distractors = Files(paths, torch.full((len(paths),), JUNK))[order]  # the first ones of a random order count
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return Faces(train, probes, people, mean, std, padding=0, flip=True, size=FACE, distractors=distractors)


def _expect(path: Path, count: int, expected: int) -> None:
    if count != expected:
        warnings.warn(f"{path} holds {count} images where the official one holds {expected}", stacklevel=3)
