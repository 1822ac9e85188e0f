"""What the tests of the examples share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write_cifar100(folder: Path, name: str, count: int, classes: int = 100) -> np.ndarray:
    """A file in the format of CIFAR-100's binary version, and its records: nearly as many of every class."""
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    records = random.integers(0, 256, (count, 3074), dtype=np.uint8)
    records[:, 0] %= 20
    records[:, 1] = random.permutation(count) % classes
    folder.mkdir(exist_ok=True, parents=True)
    records.tofile(folder / name)
    return records


def recipe_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags that change a value of a recipe."""
    (group,) = (group for group in parser._action_groups if group.title == "recipe")
    return {flag for action in group._group_actions for flag in action.option_strings} - {"--recipe"}


def assert_equal(left: object, right: object) -> None:
    """Equal to the last bit."""
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
    """Equal to the last bit: weights, optimizer, learning rates, random numbers, history."""
    for name in names:
        one, two = (torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True) for folder in (out, other))
        assert_equal(one, two)
