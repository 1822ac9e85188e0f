"""Relations between tokens of two networks, compared in plain PyTorch: the specification of ``token_relation``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import CLIPS, COMPARISONS
from ..congruence.plan import GRAM
from ..patches.reference import unit_rows
from ..shapes import accumulation_dtype

EPS = 1e-12  # a row with this norm or less is zero


def token_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    form: int,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
) -> Tensor:
    """Return the loss of networks that relate one input with itself."""
    dtype = accumulation_dtype(student, teacher)
    x, y = (as_rows(f, mask, heads, batch, channels, normalize, dtype) for f in (student, teacher))
    rows = weights_of(mask, x, heads, batch, channels)
    if form != GRAM.code:
        norms = squared_norm(x, x) + squared_norm(y, y) - 2 * squared_norm(y, x)
        total = norms.to(dtype)
        return total / pairs_of(rows, rows) if mean else total
    relations = x @ x.mT, y @ y.mT
    temperatures = student_temperature, teacher_temperature
    return compare(*relations, rows, rows, comparison, clip, temperatures, margin, mean)


def token_relation_pairs(
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    batch: bool,
    channels: bool,
    normalize: bool,
    mean: bool,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
) -> Tensor:
    """Return the loss of networks that relate a first input, the queries, with a second input, the keys."""
    dtype = accumulation_dtype(student, student_keys, teacher, teacher_keys)
    layout = heads, batch, channels, normalize, dtype
    x, y = (as_rows(f, mask, *layout) for f in (student, teacher))
    x_keys, y_keys = (as_rows(f, key_mask, *layout) for f in (student_keys, teacher_keys))
    rows = weights_of(mask, x, heads, batch, channels)
    columns = weights_of(key_mask, x_keys, heads, batch, channels)
    relations = x @ x_keys.mT, y @ y_keys.mT
    temperatures = student_temperature, teacher_temperature
    return compare(*relations, rows, columns, comparison, clip, temperatures, margin, mean)


def as_rows(
    features: Tensor, mask: Tensor | None, heads: int, batch: bool, channels: bool, normalize: bool, dtype: torch.dtype
) -> Tensor:
    """Return the rows that are related with one another: groups x rows x length.

    A group is a head of an image, or a head of the batch. Masked tokens are zero.
    """
    tokens = as_tokens(features).to(dtype)
    if mask is not None:
        tokens = tokens.masked_fill(mask.eq(0)[..., None], 0)
    if batch:
        tokens = tokens.flatten(0, 1)[None]
    rows = tokens.unflatten(2, (heads, tokens.shape[2] // heads)).transpose(1, 2).flatten(0, 1)
    if channels:
        rows = rows.mT
    return unit_rows(rows.flatten(0, 1), EPS).view(rows.shape) if normalize else rows


def as_tokens(features: Tensor) -> Tensor:
    """Return b x c x h x w maps as b x h·w x c tokens."""
    return features.flatten(2).mT if features.dim() == 4 else features


def weights_of(mask: Tensor | None, rows: Tensor, heads: int, batch: bool, channels: bool) -> Tensor:
    """Return which rows count, groups x rows. Without tokens, an image has no rows."""
    if mask is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    kept = mask.ne(0).flatten()[None] if batch else mask.ne(0)
    if channels:
        kept = kept.any(1, keepdim=True).expand(-1, rows.shape[1])
    return kept.repeat_interleave(heads, 0)


def compare(
    of_student: Tensor,
    of_teacher: Tensor,
    rows: Tensor,
    columns: Tensor,
    comparison: int,
    clip: int,
    temperatures: tuple[float, float],
    margin: float,
    mean: bool,
) -> Tensor:
    """Return the loss from the relations of both networks, groups x rows x columns."""
    if comparison >= len(COMPARISONS):  # both directions: the softmaxes of the rows, and of the columns
        comparison -= 2
        settings = comparison, clip, temperatures, margin, mean
        of_rows = compare(of_student, of_teacher, rows, columns, *settings)
        return (of_rows + compare(of_student.mT, of_teacher.mT, columns, rows, *settings)) / 2
    s, t = clipped(of_student, of_teacher, clip)
    name = COMPARISONS[comparison]
    if name in ("mse", "hinge"):
        # Relations of masked tokens are 0 in both networks.
        difference = s - t
        terms = difference.square() if name == "mse" else (difference.abs() - margin).relu()
        return terms.sum() / pairs_of(rows, columns) if mean else terms.sum()
    lowest = torch.finfo(s.dtype).min / 8
    log_p, log_q = (
        (relations / temperature).masked_fill(~columns[:, None], lowest).log_softmax(2)
        for relations, temperature in zip((s, t), temperatures, strict=True)
    )
    terms = log_q.exp() * ((log_q - log_p) if name == "kl" else -log_p)
    counted = rows & columns.any(1, keepdim=True)
    total = terms.sum(2).masked_fill(~counted, 0).sum()
    return total / counted.sum().clamp(min=1) if mean else total


def clipped(s: Tensor, t: Tensor, clip: int) -> tuple[Tensor, Tensor]:
    """Set negative relations to 0: of both networks, of pairs that are negative for the teacher, or its own."""
    if clip == 0:
        return s, t
    name, negative = CLIPS[clip - 1], t < 0
    if name != "teacher_only":
        s = s.masked_fill(s < 0 if name == "both" else (s < 0) & negative, 0)
    return s, t.masked_fill(negative, 0)


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``Σ ‖aᵀ b‖²`` over the groups. The norms nearly cancel, so they are summed in float64."""
    return (a.mT @ b).double().square().sum()


def pairs_of(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows.sum(1) * columns.sum(1)).sum().clamp(min=1)
