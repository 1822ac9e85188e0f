"""Relations between tokens: the similarities of all pairs of tokens, or of channels, of two networks, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...types import (
    ACROSS,
    AXES,
    CLIPS,
    COMPARISONS,
    CONTRASTIVE_COMPARISONS,
    FORMS,
    REDUCTIONS,
    Across,
    Axis,
    Backend,
    Clip,
    Comparison,
    FormName,
    Reduction,
)
from ..autograd import needs_gradient
from ..congruence.plan import FEATURE, GRAM, MIXED, Form, Sum, choose_form, known, multiply_adds
from ..operator import Operator
from . import fake, reference

TOKEN_RELATION = Operator(
    "token_relation",
    kernels=(fake.token_relation, fake.token_relation_pairs),
    native=("cpu",),
    memory="a gradient, b·n·c_S, twice; of one image n (c_S + c_T), and two strips of min(n, 256)·n or a c x c sum",
    over_ranks='two numbers, or with across="batch" the tokens of all ranks, B·n (c_S + c_T), up to three times',
)

HELD_ROWS = 1024  # up to this number of rows, the relations of a softmax are kept (csrc/cpu/token_relation.cpp)
# A tensor, or the queries and the keys.
Input = Tensor | Sequence[Tensor]


class Settings(NamedTuple):
    comparison: Comparison = "mse"
    temperature: float | Sequence[float] = 1.0
    margin: float = 0.0
    clip: Clip | None = None
    heads: int = 1
    across: Across = "image"
    axis: Axis = "tokens"
    normalize: bool = True
    reduction: Reduction = "mean"
    form: FormName = "auto"
    both_directions: bool = (
        False  # of queries and keys: the mean of the loss and of the loss of the transposed relations
    )

    @property
    def temperatures(self) -> tuple[float, float]:
        """Return the temperature of the student and of the teacher."""
        given = self.temperature
        student, teacher = given if isinstance(given, (list, tuple)) else (given, given)
        return checks.positive("temperature", student), checks.positive("temperature", teacher)

    @property
    def codes(self) -> tuple[int, int, int, bool, bool, bool, bool]:
        """Return the settings as the kernels take them."""
        clip = 0 if self.clip is None else 1 + CLIPS.index(self.clip)
        heads = checks.positive_int("heads", self.heads)
        flags = self.across == "batch", self.axis == "channels", bool(self.normalize), self.reduction == "mean"
        return COMPARISONS.index(self.comparison) + 2 * self.both_directions, clip, heads, *flags

    @property
    def numbers(self) -> tuple[float, float, float]:
        return *self.temperatures, checks.non_negative("margin", self.margin)

    @property
    def in_features(self) -> bool:
        """Return whether the loss has a form in feature space."""
        return self.comparison == "mse" and self.clip is None


class Problem(NamedTuple):
    """A call whose arguments are checked. Without keys, a network relates one input with itself."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    student_keys: Tensor | None
    teacher_keys: Tensor | None
    key_mask: Tensor | None
    settings: Settings

    @property
    def inputs(self) -> list[Tensor]:
        """Return the features of both networks, in the order of the reference."""
        inputs = (self.student, self.student_keys, self.teacher, self.teacher_keys)
        return [x for x in inputs if x is not None]

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        return self.mask, self.key_mask

    def of(self, inputs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Problem:
        """Return the same problem with other features and masks."""
        student, teacher = inputs[0], inputs[len(inputs) // 2]
        student_keys, teacher_keys = (inputs[1], inputs[3]) if len(inputs) == 4 else (None, None)
        return Problem(student, teacher, masks[0], student_keys, teacher_keys, masks[1], self.settings)


def token_relation(problem: Problem, backend: Backend) -> Tensor:
    """The difference of two networks' relations; see ``kdkernels.token_relation_loss``."""
    settings, tensors = problem.settings, problem.inputs

    def sums(chosen: str) -> list[list[Sum]]:
        return [[explained(problem, form_of(problem, chosen))]]

    chosen = TOKEN_RELATION.choose(backend, problem.student, sums=sums)
    if problem.student_keys is None:
        arguments = problem.mask, *settings.codes, form_of(problem, chosen).code, *settings.numbers
        return TOKEN_RELATION.loss(chosen, tensors, arguments, reference.token_relation)
    settings_of_pairs = *problem.masks, *settings.codes, *settings.numbers
    return TOKEN_RELATION.loss(chosen, tensors, settings_of_pairs, reference.token_relation_pairs, kernel=1)


def form_of(problem: Problem, chosen: str) -> Form:
    """Return the cheaper form by the cost model, or the named form. Only the CPU has the mixed form."""
    settings = problem.settings
    if not settings.in_features or problem.student_keys is not None:
        return GRAM
    of_student, of_teacher = (needs_gradient(x) for x in (problem.student, problem.teacher))
    mixed = chosen == "native" and problem.student.device.type == "cpu"
    return choose_form(settings.form, mixed, *sizes_of(problem), of_student, of_teacher)


def sizes_of(problem: Problem) -> tuple[int, int, int]:
    """Return the rows of a group, and how many numbers a row of the student and of the teacher has."""
    settings = problem.settings
    images = known(problem.student.shape[0]) if settings.across == "batch" else 1
    tokens = [images * known(tokens_of(x)) for x in (problem.student, problem.teacher)]
    channels = [known(channels_of(x)) // settings.heads for x in (problem.student, problem.teacher)]
    return (channels[0], tokens[0], tokens[1]) if settings.axis == "channels" else (tokens[0], channels[0], channels[1])


def explained(problem: Problem, form: Form) -> Sum:
    settings, (rows, student, teacher) = problem.settings, sizes_of(problem)
    wanted = [needs_gradient(x) for x in (problem.student, problem.teacher)]
    forms = [GRAM, FEATURE] if settings.in_features and problem.student_keys is None else [GRAM]
    forms += [MIXED] if form == MIXED else []
    costs = {one: multiply_adds(one, rows, student, teacher, *wanted) for one in forms}
    if settings.comparison in ("kl", "cross_entropy") and problem.student_keys is None and rows > HELD_ROWS:
        costs[GRAM] += rows * rows * (student + teacher) // 2  # the relations are computed twice
    groups = settings.heads * (1 if settings.across == "batch" else known(problem.student.shape[0]))
    return Sum("relations", rows, groups, form, costs)


def check(student: Input, teacher: Input, mask: Input | None, settings: Settings) -> Problem:
    """Check every argument. Masks are float32, and not 0 for the tokens that count."""
    check_settings(settings)
    students, teachers = _networks(student, teacher)
    whole = settings.across == "batch"
    for (student_name, own), (teacher_name, other) in zip(students, teachers, strict=True):
        for name, value in ((student_name, own), (teacher_name, other)):
            _check_features(name, value, whole)
            if value.dim() > 2:
                checks.same_batch(name, _with_batch(value), students[0][0], _with_batch(students[0][1]))
            checks.same_device(name, value, students[0][0], students[0][1])
            _check_heads(name, value, settings.heads)
        same = _check_channels if settings.axis == "channels" else _check_tokens
        same(teacher_name, other, student_name, own)
    owns, others = ([_with_batch(value) for _, value in network] for network in (students, teachers))
    masks = [_with_batch_mask(value, whole) for value in _masks(mask, len(students))]
    if len(students) == 1:
        checked = _check_mask("mask", masks[0], owns[0], others[0])
        return Problem(owns[0], others[0], checked, None, None, None, settings)
    if settings.axis == "channels":
        for (name, keys), (queries_name, queries) in ((students[1], students[0]), (teachers[1], teachers[0])):
            _check_tokens(name, keys, queries_name, queries)
        if isinstance(mask, (list, tuple)):
            raise TypeError('mask must be one tensor with axis="channels", because both inputs share their tokens')
        masks[1] = masks[0]
    else:
        for (name, keys), (queries_name, queries) in ((students[1], students[0]), (teachers[1], teachers[0])):
            _check_channels(name, keys, queries_name, queries)
    names = ("mask[0]", "mask[1]") if isinstance(mask, (list, tuple)) else ("mask", "mask")
    first, second = (_check_mask(*each) for each in zip(names, masks, owns, others, strict=True))
    return Problem(owns[0], others[0], first, owns[1], others[1], second, settings)


def check_settings(settings: Settings) -> None:
    """Check what does not depend on the features."""
    checks.one_of("comparison", settings.comparison, COMPARISONS)
    if settings.clip is not None:
        checks.one_of("clip", settings.clip, CLIPS)
    checks.one_of("across", settings.across, ACROSS)
    checks.one_of("axis", settings.axis, AXES)
    checks.one_of("reduction", settings.reduction, REDUCTIONS)
    checks.one_of("form", settings.form, FORMS)
    temperature = settings.temperature
    if isinstance(temperature, (list, tuple)) and len(temperature) != 2:
        raise ValueError(f"temperature must be a number, or the student's and the teacher's, got {temperature}")
    _ = settings.temperatures
    checks.non_negative("margin", settings.margin)
    checks.positive_int("heads", settings.heads)
    if settings.form == "feature" and not settings.in_features:
        raise ValueError(
            f'form="feature" needs comparison="mse" and clip=None, got comparison={settings.comparison!r} and '
            f"clip={settings.clip!r}"
        )


def check_contrastive(comparison: str) -> None:
    checks.one_of("comparison", comparison, CONTRASTIVE_COMPARISONS)


Named = list[tuple[str, Tensor]]


def _networks(student: Input, teacher: Input) -> tuple[Named, Named]:
    """Return the inputs of each network with their names: one, or queries and keys."""
    found: list[Named] = []
    for name, value in (("student", student), ("teacher", teacher)):
        if isinstance(value, (list, tuple)):
            if len(value) != 2:
                raise ValueError(f"{name} must be a tensor, or a pair of queries and keys, got {len(value)} entries")
            found.append([(f"{name}[{i}]", entry) for i, entry in enumerate(value)])
        else:
            found.append([(name, value)])  # type: ignore[list-item]
    students, teachers = found
    if len(students) != len(teachers):
        raise ValueError(
            f"teacher must have as many inputs as student, {len(students)}, got {len(teachers)}: pass a tensor for "
            "each network, or a pair of queries and keys for each"
        )
    return students, teachers


def _check_features(name: str, value: object, whole: bool) -> None:
    if isinstance(value, Tensor) and value.dim() == 4:
        checks.tensor(name, value, 4, "b x c x h x w")
    elif isinstance(value, Tensor) and value.dim() == 2 and whole:
        checks.tensor(name, value, 2, "n x c")
    else:
        shapes = "b x n x c or b x c x h x w" + (", or n x c" if whole else "")
        checks.tensor(name, value, 3, shapes)


def _with_batch(features: Tensor) -> Tensor:
    return features[None] if features.dim() == 2 else features


def _with_batch_mask(mask: object, whole: bool) -> object:
    return mask[None] if whole and isinstance(mask, Tensor) and mask.dim() == 1 else mask


def _masks(mask: Input | None, inputs: int) -> list[object]:
    if not isinstance(mask, (list, tuple)):
        return [mask] * inputs
    if inputs == 1:
        raise TypeError("mask must be one tensor, because every network has one input")
    if len(mask) != inputs:
        raise ValueError(f"mask must be a tensor, or one of the queries and one of the keys, got {len(mask)} entries")
    return list(mask)


def _check_heads(name: str, features: Tensor, heads: int) -> None:
    if channels_of(features) % heads:
        raise ValueError(f"heads={heads} must divide the channels of {name}, got {channels_of(features)}")


def _check_channels(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if channels_of(value) != channels_of(other):
        raise ValueError(f"{name} must have {other_name}'s {channels_of(other)} channels, got {channels_of(value)}")


def _check_tokens(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if tokens_of(value) != tokens_of(other):
        raise ValueError(
            f"{name} must have {other_name}'s {tokens_of(other)} tokens, got {tokens_of(value)}; "
            "resample the maps to one height and width first"
        )


def _check_mask(name: str, mask: object, own: Tensor, other: Tensor) -> Tensor | None:
    """Return the mask as b x n in float32."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True for the tokens that count, got {mask.dtype}")
    images, tokens = own.shape[0], tokens_of(own)
    if mask.dim() == 3 and own.dim() == 4 and mask.shape[1:] == own.shape[2:]:
        mask = mask.flatten(1)
    if tuple(mask.shape) != (images, tokens):
        maps = f" or ({images}, {own.shape[2]}, {own.shape[3]})" if own.dim() == 4 else ""
        raise ValueError(f"{name} must have shape ({images}, {tokens}){maps}, got {tuple(mask.shape)}")
    if tokens_of(other) != tokens:
        raise ValueError(f"{name} must mask as many tokens of the teacher, {tokens}, got {tokens_of(other)}")
    checks.same_device(name, mask, "student", own)
    return mask.to(torch.float32)


def channels_of(features: Tensor) -> int:
    return features.shape[1] if features.dim() == 4 else features.shape[-1]


def tokens_of(features: Tensor) -> int:
    """Return the tokens of an image, or of a batch that has no images."""
    return features.shape[2] * features.shape[3] if features.dim() == 4 else features.shape[-2]
