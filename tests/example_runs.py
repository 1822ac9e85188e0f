"""Shared by the tests of the examples."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write_cifar100(folder: Path, name: str, count: int, classes: int = 100) -> np.ndarray:
    """Write a file in the format of CIFAR-100's binary version. Return its records, with nearly equal counts of every
    class.
    """
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    records = random.integers(0, 256, (count, 3074), dtype=np.uint8)
    records[:, 0] %= 20
    records[:, 1] = random.permutation(count) % classes
    folder.mkdir(exist_ok=True, parents=True)
    records.tofile(folder / name)
    return records


def write_cifar10(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Write the six files of CIFAR-10's binary version. Return the records of each."""
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    folder.mkdir(exist_ok=True, parents=True)
    files = {}
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        files[name] = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        files[name][:, 0] = random.permutation(count) % 10
        files[name].tofile(folder / name)
    return files


def write_fashion_mnist(folder: Path, counts: dict[str, int], *, packed: bool = True) -> dict[str, np.ndarray]:
    """Write the four IDX files of Fashion-MNIST. Return the array of each."""
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    folder.mkdir(exist_ok=True, parents=True)
    arrays = {}
    for part, count in counts.items():
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (random.permutation(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return arrays


def idx(array: np.ndarray) -> bytes:
    """Return the content of an IDX file: two zeros, 8 for unsigned bytes, the number of dimensions, the big-endian
    sizes, the bytes.
    """
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def recipe_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags that change a value of a recipe."""
    (group,) = (group for group in parser._action_groups if group.title == "recipe")
    return {flag for action in group._group_actions for flag in action.option_strings} - {"--recipe"}


def assert_equal(left: object, right: object) -> None:
    """Assert bitwise equality."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    else:
        assert left == right


def assert_same_checkpoints(out: Path, other: Path, names: Iterable[str]) -> None:
    """Assert bitwise equality of weights, optimizer, learning rates, random numbers and history."""
    for name in names:
        one, two = (torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True) for folder in (out, other))
        assert_equal(one, two)


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(torch.randint(2**31, ()).item()).integers(0, 256, shape, dtype=np.uint8)


def write_stl10(folder: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Write STL-10's labelled files. Return the array of each."""
    folder.mkdir(exist_ok=True, parents=True)
    files = {}
    for part, count in counts.items():
        files[f"{part}_X.bin"] = random_bytes(count, 3, 96, 96)
        files[f"{part}_y.bin"] = (np.arange(count) % 10 + 1).astype(np.uint8)
    for name, array in files.items():
        array.tofile(folder / name)
    return files


def write_svhn(folder: Path, counts: dict[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """Write SVHN's cropped digits. Return the content of each part."""
    from scipy.io import savemat

    parts = {}
    for part, count in counts.items():
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        parts[part] = {"X": random_bytes(32, 32, 3, count), "y": labels}
        savemat(folder / f"{part}_32x32.mat", parts[part], do_compression=True)
    return parts


def write_image(path: Path, grey: int, size: tuple[int, int]) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (grey,) * 3).save(path)


def write_folders(folder: Path, classes: int, train: int, test: int) -> None:
    """Write images in folders like ImageNet's. All pixels of class n are 50 n."""
    for part, count in (("train", train), ("val", test)):
        for label in range(classes):
            for number in range(count):
                write_image(folder / part / f"n{label}" / f"{number}.png", 50 * label, (50, 40))


def write_tiny_imagenet(folder: Path, classes: int, train: int, test: int) -> None:
    """Write the folders of Tiny-ImageNet. All pixels of class n are 50 n. Only class 0 has a word."""
    lines = []
    for label in range(classes):
        for number in range(train):
            write_image(folder / "train" / f"n{label}" / "images" / f"n{label}_{number}.JPEG", 50 * label, (64, 64))
        for _ in range(test):
            lines.append(f"val_{len(lines)}.JPEG\tn{label}\t0\t32\t44\t62\n")
            write_image(folder / "val" / "images" / f"val_{len(lines) - 1}.JPEG", 50 * label, (64, 64))
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "words.txt").write_text("n0\tthing 0, object\n")


def write_market1501(folder: Path, persons: int = 4, cameras: int = 2, frames: int = 3) -> None:
    """Write Market-1501's folders. The persons 1, 3, 5, ... are to learn from, the others to find. All pixels of a
    person have one value. The gallery has an image of junk and one of a distractor.
    """
    for person in range(1, 2 * persons + 1):
        for camera in range(1, cameras + 1):
            for frame in range(frames):
                part = "bounding_box_train" if person % 2 else "query" if frame == 0 else "bounding_box_test"
                name = f"{person:04d}_c{camera}s1_{frame:06d}_00.jpg"
                write_image(folder / part / name, 25 * person, (8, 16))
    for name in ("-1_c1s1_000401_03.jpg", "0000_c2s1_000001_02.jpg"):
        write_image(folder / "bounding_box_test" / name, 255, (8, 16))
    (folder / "query" / "Thumbs.db").touch()


def write_msmt17(folder: Path, persons: int = 3, cameras: int = 2) -> None:
    """Write MSMT17's lists and images: two frames of each person from each camera."""
    lists: dict[str, list[str]] = {name: [] for name in ("train", "val", "query", "gallery")}
    for part, (first, second) in {"train": ("train", "val"), "test": ("query", "gallery")}.items():
        for person in range(persons):
            for camera in range(1, cameras + 1):
                for name in (first, second):
                    path = f"{person:04d}/{person:04d}_{len(lists[name]):03d}_{camera:02d}_0303morning_0015_0.jpg"
                    lists[name].append(f"{path} {person}\n")
                    write_image(folder / part / path, 50 * person, (8, 20))
    for name, lines in lists.items():
        (folder / f"list_{name}.txt").write_text("".join(lines))


def write_faces(folder: Path, people: int = 3, images: int = 3, distractors: int = 12) -> None:
    """Write faces to learn, to find, and distractors."""
    for part in ("train", "probes"):
        for person in range(people):
            for number in range(images):
                write_image(folder / part / f"m.{person}" / f"{number}.jpg", 50 * person + 5 * number, (20, 20))
    for number in range(distractors):
        write_image(folder / "distractors" / f"{number % 2}" / f"{number}.jpg", 20 * number, (20, 20))
