"""What all modules share: a module is a dataclass of its settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .. import backends, groups


@dataclass(eq=False, repr=False)
class SettingsModule(nn.Module):
    """A module whose settings are the fields of a dataclass, checked when the module is made and shown by ``repr``.

    A setting can be changed later. The function that the module calls then checks it. Subclasses are dataclasses with
    ``eq=False, repr=False``, because modules compare by identity and ``nn.Module`` has a ``repr``.
    """

    def __post_init__(self) -> None:
        super().__init__()
        self._names = tuple(field.name for field in fields(self))  # asking for the fields takes 2 µs a call
        self.check()
        for name, value in self.settings.items():
            setattr(self, name, _plain(value))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and "_parameters" not in self.__dict__:  # while the settings are taken
            raise TypeError(f"{name} must be a fixed setting, got a Parameter; what learns is given to the call")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for a setting that no call accepts."""
        settings = self.settings
        if "backend" in settings:
            backends.requested(settings["backend"])
        if "group" in settings:
            groups.check(settings["group"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name, as the function that the module calls takes them."""
        return {name: getattr(self, name) for name in self._names}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file holds. Copies share the process group."""
        state = dict(self.__dict__)
        return state | {"group": groups.name_of(state["group"])} if "group" in state else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "group" in state:
            state = state | {"group": groups.looked_up(state["group"])}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _plain(value: Any) -> Any:
    """Return NumPy's and PyTorch's numbers as Python's, because torch.compile breaks graphs at the others."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "item") else value
