"""Capture the feature maps of any model with hooks. The model itself does not change."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from .. import checks

__all__ = ["FeatureCapture"]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU)
Runs = Literal["last", "first", "all"]
Of = Literal["output", "input"]
_RUNS, _OF = get_args(Runs), get_args(Of)

Selector = int | str | Callable[..., Any]
Layout = str | Callable[[Tensor], Tensor]
Option = TypeVar("Option")


class _Stored(NamedTuple):
    """A tensor as the model made it, and how often it had been written to by then."""

    value: Tensor
    version: int | None


class _Hook:
    """Call a method of a capture that is still alive. The model that has the hook does not keep the capture alive.

    If model and capture are copied together, the copied hooks call the copied capture. If only the model is copied, the
    capture in its hooks ends with the copying, and takes the copied hooks with it.
    """

    def __init__(self, capture: FeatureCapture, method: str, *given: object) -> None:
        self._capture = weakref.ref(capture)
        self._method = method
        self._given = given

    def __call__(self, *arguments: object) -> None:
        capture = self._capture()
        if capture is not None:
            getattr(capture, self._method)(*self._given, *arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[object, ...]]:
        return _Hook, (self._capture() or _Gone(), self._method, *self._given)


class _Gone:
    """A capture that ended before its hook was copied; the copy's end comes at once, too."""


class FeatureCapture:
    """Hold the outputs, or inputs, of named submodules from a model's last forward pass.

    It holds the maps until the next forward pass, ``clear()`` or ``remove()``. The end of a ``with`` block switches it
    off, and the next ``with`` block switches it on again; the maps stay readable. A map that a later module overwrites
    in place is copied just before that. With ``before_relu``, the input of an in-place ReLU is copied too. Other maps
    are not copied. What checkpointing runs again in the backward pass is not captured again. When
    nobody holds the capture any more, its hooks leave the model. The model can be copied and saved meanwhile. A copy of
    the model has no hooks. If model and capture are copied together, the copies belong together, too.

    Args:
        model: any module, for example of torchvision, timm or transformers. ``nn.DataParallel`` raises an error,
            because its replicas would overwrite each other's maps. The wrappers of DistributedDataParallel, FSDP,
            ``torch.compile`` and averaged models are looked through, wherever they stand in the model. Create the
            capture before the first call of a compiled model, because it does not see hooks that are added later.
        names: the submodules, as ``model.named_modules()`` names them, without the names that wrappers add. A ``*``
            stands for any text between two dots: ``"blocks.*.attn"`` is the attention of every block, in their order.
        before_relu: capture the maps before the ReLU at the end of each module (the "+Pre" of SemCKD). This ReLU must
            be a module (``nn.ReLU``, ``nn.ReLU6``, ``nn.LeakyReLU`` or ``nn.PReLU``) that is called last. Hooks do not
            see functions.
        of: "output", or "input": the module's arguments, by default the first one.
        select: which tensor to take if a module returns several: an index, a key or attribute, or a function of the
            returned value. With ``of="input"``: the place or the name of an argument, or a function that takes the
            module's arguments.
        layout: the order of a map's dimensions. "bhwc" (Swin and other vision models that put channels last) becomes
            b x c x h x w, as a view. A function is applied to the tensor, for example to drop a class token. By default
            maps stay as they are.
        runs: which map to keep if a module runs several times in one forward pass: its "last", its "first", or "all" of
            them as a list.

    ``of``, ``select`` and ``layout`` hold for all names, or are dicts by name (a pattern as given in ``names``). A name
    that is not in the dict has the default.

    Raises:
        ValueError: if the model has no module of a name. The message lists similar names.
        RuntimeError: ``features`` raises it if a module did not run, or if a function without a hook overwrote its map.
            Compiled code and inference mode do not notice an overwritten map. The forward pass raises it with
            ``before_relu`` if a module does not end in a ReLU, and if a module runs inside reentrant checkpointing,
            because its map has no gradient there.
        TypeError: the forward pass raises it if a module does not return a tensor and ``select`` does not pick one.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from kdkernels.nn import FeatureCapture
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
        >>> capture = FeatureCapture(model, ["0", "2"])
        >>> logits = model(torch.randn(4, 3, 32, 32))
        >>> [tuple(features.shape) for features in capture.features]
        [(4, 8, 16, 16), (4, 16, 8, 8)]
    """

    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str],
        *,
        before_relu: bool = False,
        of: Of | Mapping[str, Of] = "output",
        select: Selector | Mapping[str, Selector] | None = None,
        layout: Layout | Mapping[str, Layout] | None = None,
        runs: Runs = "last",
    ) -> None:
        checks.one_of("runs", runs, _RUNS)
        modules = _named_modules(model)
        if any(isinstance(module, nn.DataParallel) for module in model.modules()):
            raise ValueError("model must not contain nn.DataParallel, got one; use DistributedDataParallel")
        patterns = [names] if isinstance(names, str) else list(names)
        given = {"of": of, "select": select, "layout": layout}
        for option, value in given.items():
            unknown = set(value) - set(patterns) if isinstance(value, Mapping) else ()
            if unknown:
                raise ValueError(f"{option} must have keys from names {patterns}, got {sorted(unknown)}")
        self.names: list[str] = []
        self._select: dict[str, Selector | None] = {}
        self._layout: dict[str, Layout | None] = {}
        self._of: dict[str, Of] = {}
        for pattern in patterns:
            for name in _matching(pattern, modules, model):
                self.names.append(name)
                self._of[name] = _option(of, pattern, "output")
                self._select[name] = _option(select, pattern, None)
                self._layout[name] = _option(layout, pattern, None)
                _check_options(name, self._of[name], self._select[name], self._layout[name], before_relu)
        self.before_relu = before_relu
        self.runs = runs
        self._model = model
        self._modules = {name: modules[name] for name in self.names}
        self._maps: dict[str, list[_Stored]] = {}
        self._activation: tuple[Tensor, Tensor] | None = None  # what left the last one, and what came into it
        self._entered: dict[int, Tensor] = {}
        self._learning: bool | None = None  # grad mode when the model was entered, if it was
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)
        self._attach()

    @property
    def features(self) -> list[Any]:
        """The maps of the last forward pass, in the order of ``names``; a list of maps each with ``runs="all"``."""
        missing = [name for name in self.names if name not in self._maps]
        if missing:
            raise RuntimeError(
                f"there is no map of {', '.join(map(repr, missing))}: it has not run since the model began"
                + self._why_missing(missing)
            )
        for name, stored in self._maps.items():
            if any(version is not None and version != _version(value) for value, version in stored):
                raise RuntimeError(
                    f"the map of {name!r} was overwritten in place after the module returned it; "
                    "capture what comes after, or use an operation that is not in place"
                )
        maps = [[self._laid_out(name, value) for value, _ in self._maps[name]] for name in self.names]
        return maps if self.runs == "all" else [one for (one,) in maps]

    def clear(self) -> None:
        """Let go of the maps."""
        self._maps = {}
        self._activation = None
        self._entered = {}

    def remove(self) -> None:
        """Take the hooks off the model and let go of the maps."""
        _remove(self._handles)
        self.clear()

    def __enter__(self) -> FeatureCapture:
        if not self._handles:
            self.clear()
            self._attach()
        return self

    def __exit__(self, *exception: object) -> None:
        _remove(self._handles)

    def __getstate__(self) -> dict[str, object]:
        """Return what a copy has: everything but the maps."""
        return {**self.__dict__, "_maps": {}, "_activation": None, "_entered": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, _remove, self._handles)

    def _attach(self) -> None:
        # The names come first: an input that an in-place module overwrites must be there for it to be copied.
        handles = [root.register_forward_pre_hook(_Hook(self, "_begin")) for root in _layers_of(self._model)]
        for name, module in self._modules.items():
            if self._of[name] == "input":
                hook = _Hook(self, "_store_input", name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif not self.before_relu:
                handles.append(module.register_forward_hook(_Hook(self, "_store_output", name)))
        handles += [
            module.register_forward_pre_hook(_Hook(self, "_rescue"))
            for module in self._model.modules()
            if getattr(module, "inplace", False)
        ]
        if self.before_relu:
            chosen = {inner for outer in self._modules.values() for inner in outer.modules()}
            for number, module in enumerate(inner for inner in chosen if isinstance(inner, _ACTIVATIONS)):
                handles.append(module.register_forward_pre_hook(_Hook(self, "_enter", number)))
                handles.append(module.register_forward_hook(_Hook(self, "_leave", number)))
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(_Hook(self, "_store_before_relu", name)))
        self._handles.extend(handles)

    def _laid_out(self, name: str, value: Tensor) -> Tensor:
        layout = self._layout[name]
        if layout is None:
            return value
        if callable(layout):
            return layout(value)
        if value.dim() != 4:
            raise ValueError(
                f"layout 'bhwc' wants maps of 4 dimensions, got shape {tuple(value.shape)} of {name!r}; "
                "give a function that makes a map of it"
            )
        return value.permute(0, 3, 1, 2)

    def _why_missing(self, missing: list[str]) -> str:
        why = ""
        module = self._modules[missing[0]]
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module):
            last = f"{missing[0]}.{[*module._modules][-1]}"
            why += f"; {missing[0]!r} is a container, and a model may call its parts one by one: capture {last!r}"
        if "torch._dynamo" in sys.modules:  # something has been compiled, and whether it was this cannot be seen
            why += (
                "; if the model is compiled, set up the capture before its first call and leave it on, "
                "or call torch.compiler.reset()"
            )
        return why

    # What the hooks call. What PyTorch gives comes last.

    def _begin(self, *_: object) -> None:
        self.clear()
        self._learning = torch.is_grad_enabled()

    def _store_output(self, name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        self._store(name, _selected(name, self._select[name], output))

    def _store_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._store(name, _selected_input(name, self._select[name], module, args, kwargs))

    def _store(self, name: str, value: Tensor) -> None:
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:  # checkpointing runs the module again for its gradient
                return
            if self._learning is not False and not torch.is_grad_enabled() and _in_autograd_function():
                raise RuntimeError(
                    f"the map of {name!r} has no gradient: the module runs inside reentrant checkpointing; pass "
                    "use_reentrant=False to torch.utils.checkpoint (gradient_checkpointing_kwargs in transformers)"
                )
        stored = _Stored(value, _version(value))
        if self.runs == "all":
            self._maps[name] = [*self._maps.get(name, ()), stored]
        elif self.runs == "last" or name not in self._maps:
            self._maps[name] = [stored]

    def _store_before_relu(self, name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if self._activation is None or self._activation[0] is not output:
            raise RuntimeError(
                f"before_relu: {name!r} must return what a ReLU module in it gave last, and does not; "
                "capture a module that does, or if its output is linear, capture it without before_relu"
            )
        self._store(name, self._activation[1])

    def _enter(self, number: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what comes into an activation until it leaves."""
        self._entered[number] = inputs[0].clone() if getattr(module, "inplace", False) else inputs[0]

    def _leave(self, number: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._activation = output, self._entered.pop(number)

    def _rescue(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        """Copy the maps that the in-place ``module`` is about to overwrite."""
        for stored in self._maps.values():
            for i, (value, version) in enumerate(stored):
                if any(value is given for given in inputs) and version in (None, _version(value)):
                    copy = value.clone()
                    stored[i] = _Stored(copy, _version(copy))


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _version(value: Tensor) -> int | None:
    """Return how often the tensor was written to, or None in compiled code and inference mode, which do not count."""
    return None if torch.compiler.is_compiling() or value.is_inference() else value._version


def _option(given: Option | Mapping[str, Option], pattern: str, default: Option) -> Option:
    return given.get(pattern, default) if isinstance(given, Mapping) else given


def _check_options(name: str, of: Of, select: Selector | None, layout: Layout | None, before_relu: bool) -> None:
    checks.one_of(f"of for {name!r}", of, _OF)
    if before_relu and (of == "input" or select is not None):
        raise ValueError(f"before_relu must be False where of is 'input' or select is given, got True for {name!r}")
    if layout is not None and not callable(layout):
        checks.one_of(f"layout for {name!r}", layout, ("bhwc",))


def _selected(name: str, select: Selector | None, value: Any) -> Tensor:
    """Return the tensor that ``select`` picks from what a module returned."""
    found = value
    if callable(select):
        found = select(value)
    elif select is not None:
        try:
            found = getattr(value, str(select)) if _has_attribute(value, select) else value[select]
        except (KeyError, IndexError, TypeError):
            raise TypeError(f"select: {name!r} returns {_described(value)}, got {select!r}") from None
    if not isinstance(found, Tensor):
        what = "select must pick a tensor from" if select is not None else "pass select to pick a tensor from"
        raise TypeError(
            f"names: {name!r} must return a tensor to be captured, got {type(found).__name__}; "
            f"{what} {_described(value)}"
        )
    return found


def _has_attribute(value: Any, select: int | str) -> bool:
    return isinstance(select, str) and not isinstance(value, Mapping) and hasattr(value, select)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"


def _selected_input(
    name: str, select: Selector | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return the tensor that ``select`` picks from what a module is called with."""
    if callable(select):
        found = select(*args, **kwargs)
    elif isinstance(select, str):
        found = kwargs.get(select)
        if found is None:
            found = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get(select)
    else:
        given = [*args, *kwargs.values()]
        found = given[select or 0] if -len(given) <= (select or 0) < len(given) else None
    if not isinstance(found, Tensor):
        names = [*map(str, range(len(args))), *map(repr, kwargs)]
        raise TypeError(
            f"names: {name!r} must take a tensor to be captured, got {type(found).__name__}; "
            f"pass select to pick one of its arguments {', '.join(names)}"
        )
    return found


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper of PyTorch stands for."""
    if isinstance(module, DistributedDataParallel | AveragedModel):
        return module.module
    # torch.compile's, FSDP's and activation checkpointing's wrappers; their classes take long to import.
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if isinstance(inner := module._modules.get(name), nn.Module):
            return inner
    return None


def _layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module, then the module in it if it is a wrapper, and so on."""
    layer: nn.Module | None = module
    while layer is not None:
        yield layer
        layer = _wrapped(layer)


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names, without those that wrappers add, and with them after that.

    Of a wrapper and the module in it, which then have one name, it is the wrapper: what it returns is what the model
    goes on with, and hooks on a compiled module run whenever they were added.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str, around: frozenset[nn.Module]) -> None:
        if module in around:
            return
        found.setdefault(name, module)
        inner = _wrapped(module)
        if inner is not None:
            walk(inner, name, around | {module})
            return
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}" if name else child_name, around | {module})

    walk(model, "", frozenset())
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(name, module)
    return found


def _matching(pattern: str, modules: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """Return the names that a pattern stands for, in the order of the model."""
    if pattern in modules:
        return [pattern]
    parts = pattern.split(".")
    if "*" in pattern:
        found = [
            name
            for name in modules
            if len(split := name.split(".")) == len(parts) and all(map(fnmatchcase, split, parts))
        ]
        first_names = {modules[name]: name for name in reversed(found)}
        if found:
            return [name for name in found if first_names[modules[name]] == name]
    close = get_close_matches(pattern, modules, cutoff=0.5)
    close += [name for name in modules if name and name.split(".")[-1] == parts[-1] and name not in close][:3]
    close = close or [name for name in modules if name and "." not in name]
    raise ValueError(f"names: the model has no module {pattern!r}; close: {', '.join(map(repr, close))}")


def _in_autograd_function() -> bool:
    """Return whether the forward pass of a Python autograd function runs, as under reentrant checkpointing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False
