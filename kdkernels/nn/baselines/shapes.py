"""Checks of what the baselines are called with: maps and embeddings of the channels that a module was made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import checks


def maps(name: str, value: object, channels: int) -> Tensor:
    """Check feature maps b x c x h x w with the given channels."""
    value = checks.tensor(name, value, 4, "b x c x h x w")
    if value.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {value.shape[1]}")
    return value


def embeddings(name: str, value: object, width: int) -> Tensor:
    """Check embeddings b x d of the given width."""
    value = checks.tensor(name, value, 2, "b x d")
    if value.shape[1] != width:
        raise ValueError(f"{name} must have width {width}, got {value.shape[1]}")
    return value


def same_samples(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    checks.same_batch(name, value, other_name, other)
    checks.same_device(name, value, other_name, other)


def layers(name: str, value: object, length: int | None = None) -> list[Tensor]:
    """Check a sequence of tensors, one for each layer. ``length`` is how many, and None stands for at least one."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, one per layer or network, got {type(value).__name__}")
    if len(value) != length if length is not None else not value:
        raise ValueError(f"{name} must hold {length or 'at least 1'} layers, got {len(value)}")
    return list(value)


def indices(name: str, value: object, shape: Sequence[int], samples: int, like: Tensor) -> Tensor:
    """Check the numbers of samples in the training set, int64. Values are only checked on the CPU, because a check on a
    GPU would wait for the device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the student's device {like.device}, got {value.device}")
    if checks.readable(value):
        smallest, largest = (extreme.item() for extreme in value.aminmax())
        if smallest < 0 or largest >= samples:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"{name} must be from 0 to {samples - 1}, got {wrong}")
    return value.long()


def channels(student: object, teacher: object) -> None:
    """Check the channels of as many student layers as teacher layers."""
    for name, value in (("student_channels", student), ("teacher_channels", teacher)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{name} must be a sequence with the channels of each layer, got {type(value).__name__}")
        if not value:
            raise ValueError(f"{name} must hold at least 1 layer, got {value!r}")
        for one in value:
            checks.positive_int(f"a number in {name}", one)
    if len(student) != len(teacher):  # type: ignore[arg-type]
        raise ValueError(f"teacher_channels must hold as many layers as student_channels={student!r}, got {teacher!r}")


def maps_of_layers(name: str, value: object, channels: Sequence[int], first: Tensor | None = None) -> list[Tensor]:
    """Check the feature maps of every layer. ``first`` is the student's first layer, whose samples they show."""
    found = layers(name, value, len(channels))
    for index, (layer, width) in enumerate(zip(found, channels, strict=True)):
        maps(f"{name}[{index}]", layer, width)
        same_samples(f"{name}[{index}]", layer, "student[0]", found[0] if first is None else first)
    return found


def features(name: str, value: object, first: Tensor) -> Tensor:
    """Check features b x ... of the samples of ``first``, the student's."""
    value = checks.tensor(name, value, None, "b x ...")
    same_samples(name, value, "student", first)
    return value


def as_parameters(features: Tensor, module: nn.Module) -> Tensor:
    """Return the features in the dtype of the module's parameters. Autocast converts them itself."""
    if torch.is_autocast_enabled(features.device.type):
        return features
    return features.to(next(module.parameters()).dtype)
