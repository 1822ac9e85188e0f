"""Explain what a call would do, without doing it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from . import functional
from .ops import operator
from .ops.congruence.plan import Sum


@dataclass(frozen=True)
class Explanation:
    """The backend that a call takes, why other backends cannot run it, and the form of each sum of each stage.

    ``memory`` is the memory of the call besides its arguments, in numbers. ``over_ranks`` is what the processes of its
    group exchange. It is empty without a group.
    """

    name: str
    backend: str
    obstacles: dict[str, str]
    stages: list[list[Sum]]
    memory: str = ""
    over_ranks: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.backend} backend"]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.obstacles.items()]
        for i, sums in enumerate(self.stages):
            lines += [f"  stage {i}"] + [f"    {part}" for part in sums]
        lines += [f"  memory: {self.memory}"] if self.memory else []
        lines += [f"  exchanged by the ranks: {self.over_ranks}"] if self.over_ranks else []
        return "\n".join(lines)


def explain(name: str, *args: object, **settings: object) -> Explanation:
    """Return which backend and form a call would take, with the modelled cost of each form.

    It makes the call, up to the point where the kernels would start.

    Args:
        name: the name of a function that takes ``backend``, such as "local_correlation_loss" or "kd_loss".
        args: the positional arguments of the call.
        settings: the keyword arguments of the call. With a group, every process must ask. The costs then belong to one
            process, and a number sent counts as many multiply-adds.

    Returns:
        An ``Explanation``. Print it, or read its ``backend``, ``obstacles`` and ``stages``.

    Raises:
        ValueError: if there is no such function. Wrong arguments raise what the call itself would raise.

    Examples:
        >>> import torch
        >>> import kdkernels
        >>> student, teacher = torch.randn(8, 16, 8, 8), torch.randn(8, 64, 8, 8)
        >>> explanation = kdkernels.explain("local_correlation_loss", student, teacher, k=4, backend="reference")
        >>> explanation.backend
        'reference'
    """
    names = explained_names()
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    function = getattr(functional, name)
    over_ranks = inspect.signature(function).bind(*args, **settings).arguments.get("group") is not None
    operator.explaining = True
    try:
        function(*args, **settings)
    except operator.Explained as call:
        described = call.operator
        exchanged = described.over_ranks if over_ranks else ""
        return Explanation(name, call.backend, call.obstacles, list(call.sums), described.memory, exchanged)
    finally:
        operator.explaining = False
    raise AssertionError(f"{name} chose no backend")  # every function of the list does


def explained_names() -> tuple[str, ...]:
    """Return the functions that choose a backend."""
    functions = {name: getattr(functional, name) for name in functional.__all__}
    return tuple(name for name, function in functions.items() if "backend" in inspect.signature(function).parameters)
