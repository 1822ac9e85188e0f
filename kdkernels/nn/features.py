"""Feature maps of any model, caught by hooks: the model stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["FeatureCapture"]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU)


class FeatureCapture:
    """The outputs of named submodules in a model's last forward pass, by forward hooks:

        capture = FeatureCapture(model, ["layer1", "layer2", "layer3", "layer4"])  # a ResNet of torchvision or timm
        logits = model(images)
        maps = capture.features

    It holds the maps until the next forward pass or ``remove()``; as a context manager it removes itself. A module that
    runs several times in one pass gives its last output.

    Args:
        model: any module, for instance of torchvision or timm. ``nn.DataParallel`` is refused, for its replicas would
            write over each other's maps; DistributedDataParallel and the module inside it are fine. A model that is to
            be compiled gets its capture first, for ``torch.compile`` does not look for hooks added later.
        names: the submodules, as ``model.named_modules()`` calls them.
        before_relu: the maps before the ReLU that each module ends in (the "+Pre" of SemCKD). It must be a module
            (``nn.ReLU``, ``nn.ReLU6``, ``nn.LeakyReLU`` or ``nn.PReLU``), called last; hooks do not see functions.

    A map that a later module overwrites in place is copied just before that, and so is what an in-place ReLU gets with
    ``before_relu``; other maps are not copied. The model can be copied and saved meanwhile: the copy's hooks fill a
    capture of its own.

    Raises:
        ValueError: if the model has no module of a name, naming those that are close.
        RuntimeError: by ``features``, if a module did not run, or if its map was overwritten by a function that no hook
            sees (compiled code and inference mode do not notice that); in the forward pass, if with ``before_relu`` a
            module does not end in a ReLU.
        TypeError: in the forward pass, if what a module returns is no tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, before_relu: bool = False) -> None:
        self.names = [names] if isinstance(names, str) else list(names)
        modules = dict(model.named_modules())
        if any(isinstance(module, nn.DataParallel) for module in modules.values()):
            raise ValueError("model must not contain nn.DataParallel, got one; use DistributedDataParallel")
        for name in self.names:
            if name not in modules:
                close = get_close_matches(name, modules) or [child for child, _ in model.named_children()]
                raise ValueError(f"names: the model has no module {name!r}; close: {', '.join(map(repr, close))}")

        self._maps: dict[str, tuple[Tensor, int | None]] = {}
        self._activation: tuple[Tensor, Tensor] | None = None
        self._handles = [model.register_forward_pre_hook(self._forget)]
        for module in modules.values():
            if getattr(module, "inplace", False):
                self._handles.append(module.register_forward_pre_hook(self._rescue))
        if before_relu:
            chosen = [modules[name] for name in self.names]
            for module in {inner for outer in chosen for inner in outer.modules() if isinstance(inner, _ACTIVATIONS)}:
                self._watch(module)
        for name in self.names:
            store = self._store_before_relu if before_relu else self._store
            self._handles.append(modules[name].register_forward_hook(partial(store, name)))

    @property
    def features(self) -> list[Tensor]:
        """The maps of the last forward pass, in the order of ``names``."""
        missing = [name for name in self.names if name not in self._maps]
        if missing:
            raise RuntimeError(
                f"there is no map of {', '.join(map(repr, missing))}: it has not run since the model began"
            )
        for name, (value, version) in self._maps.items():
            if version is not None and version != _version(value):
                raise RuntimeError(
                    f"the map of {name!r} was overwritten in place after the module returned it; "
                    "capture what comes after, or use an operation that is not in place"
                )
        return [self._maps[name][0] for name in self.names]

    def remove(self) -> None:
        """Take the hooks off the model and let go of the maps."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, object]:
        """Copying or saving the model takes its hooks along, and with them this object: without the maps."""
        return {**self.__dict__, "_maps": {}, "_activation": None}

    # The hooks are methods and get no closures, so that models can be saved with them. What PyTorch gives comes last.

    def _forget(self, *_: object) -> None:
        self._maps = {}
        self._activation = None

    def _store(self, name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"names: {name!r} must return a tensor to be captured, got {type(output).__name__}")
        self._maps[name] = output, _version(output)

    def _store_before_relu(self, name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if self._activation is None or self._activation[0] is not output:
            raise RuntimeError(
                f"before_relu: {name!r} must return what a ReLU module in it gave last, and does not; "
                "capture a module that does, or if its output is linear, capture it without before_relu"
            )
        self._store(name, module, inputs, self._activation[1])

    def _watch(self, activation: nn.Module) -> None:
        """Keep what comes into the activation beside what comes out."""
        before: list[Tensor] = []
        self._handles.append(activation.register_forward_pre_hook(partial(self._enter, before)))
        self._handles.append(activation.register_forward_hook(partial(self._leave, before)))

    def _enter(self, before: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before[:] = [inputs[0].clone() if getattr(module, "inplace", False) else inputs[0]]

    def _leave(self, before: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._activation = output, before.pop()

    def _rescue(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        """Copy the maps that the in-place ``module`` is about to overwrite."""
        for name, (value, version) in self._maps.items():
            if any(value is given for given in inputs) and version in (None, _version(value)):
                copy = value.clone()
                self._maps[name] = copy, _version(copy)


def _version(value: Tensor) -> int | None:
    """How often the tensor was written to; None where that is not counted, in compiled code and inference mode."""
    return None if torch.compiler.is_compiling() or value.is_inference() else value._version
