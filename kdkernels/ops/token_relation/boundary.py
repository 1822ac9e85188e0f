"""What ``token_relation`` and ``token_relation_pairs`` expect of their arguments."""

from __future__ import annotations

from torch import Tensor

from ...boundary import Check


def check_token_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    channels: bool,
    form: int,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
    grad_teacher: bool,
) -> None:
    check = Check("token_relation")
    _features(check, "student", student, heads)
    _features(check, "teacher", teacher, heads)
    _same(check, channels, "teacher", teacher, "student", student)
    _mask(check, "mask", mask, student, "teacher", teacher)
    if comparison not in range(4):
        check.fail(f"comparison must be 0 (mse), 1 (hinge), 2 (kl) or 3 (cross_entropy), got {comparison}")
    _settings(check, clip, student_temperature, teacher_temperature, margin)
    if form not in (0, 1, 7):
        check.fail(f"form must be 0 (gram), 1 (mixed) or 7 (feature), got {form}")
    if form != 0 and (comparison != 0 or clip != 0):
        check.fail(f"form must be 0 (gram) unless comparison and clip are 0, got {form}")
    if form == 1 and grad_teacher:
        check.fail("form must be 0 (gram) or 7 (feature) for the second gradient, got 1")
    if form == 1 and check.on_gpu:
        check.fail("form must be 0 (gram) or 7 (feature) on a GPU, got 1")


def check_token_relation_pairs(
    student: Tensor,
    student_keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    comparison: int,
    clip: int,
    heads: int,
    channels: bool,
    student_temperature: float,
    teacher_temperature: float,
    margin: float,
) -> None:
    check = Check("token_relation_pairs")
    _features(check, "student", student, heads)
    _features(check, "student_keys", student_keys, heads)
    _features(check, "teacher", teacher, heads)
    _features(check, "teacher_keys", teacher_keys, heads)
    _same(check, channels, "teacher", teacher, "student", student)
    _same(check, channels, "teacher_keys", teacher_keys, "student_keys", student_keys)
    _same(check, not channels, "student_keys", student_keys, "student", student)
    _same(check, not channels, "teacher_keys", teacher_keys, "teacher", teacher)
    _mask(check, "mask", mask, student, "teacher", teacher)
    _mask(check, "key_mask", key_mask, student_keys, "teacher_keys", teacher_keys)
    if comparison not in range(6):
        check.fail(
            "comparison must be 0 (mse), 1 (hinge), 2 (kl), 3 (cross_entropy), 4 (kl in both directions) or 5 "
            f"(cross_entropy in both directions), got {comparison}"
        )
    _settings(check, clip, student_temperature, teacher_temperature, margin)


def _tokens(x: Tensor) -> int:
    return x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]


def _channels(x: Tensor) -> int:
    return x.shape[1 if x.dim() == 4 else 2]


def _features(check: Check, name: str, x: Tensor, heads: int) -> None:
    check.tensor(name, x, "b c h w" if isinstance(x, Tensor) and x.dim() == 4 else "b n c")
    check.forget(1)
    check.positive_int("heads", heads)
    channels = _channels(x)
    check.require(channels % heads == 0, lambda: f"{name} must have a multiple of {heads} channels, got {channels}")


def _same(check: Check, channels: bool, name: str, x: Tensor, other: str, of: Tensor) -> None:
    """Check that two inputs have equally many channels, or equally many tokens."""
    found, expected = (_channels(one) if channels else _tokens(one) for one in (x, of))
    what = "channels" if channels else "tokens"
    check.require(found == expected, lambda: f"{name} must have {other}'s {expected} {what}, got {found}")


def _mask(check: Check, name: str, mask: Tensor | None, student: Tensor, other: str, teacher: Tensor) -> None:
    if mask is None:
        return
    _same(check, False, other, teacher, "student", student)
    check.bind("n", _tokens(student))
    check.tensor(name, mask, "b n")
    check.forget(1)


def _settings(check: Check, clip: int, student_temperature: float, teacher_temperature: float, margin: float) -> None:
    if clip not in range(4):
        check.fail(f"clip must be 0 (none), 1 (both), 2 (teacher) or 3 (teacher_only), got {clip}")
    check.positive("student_temperature", student_temperature)
    check.positive("teacher_temperature", teacher_temperature)
    check.non_negative("margin", margin)
