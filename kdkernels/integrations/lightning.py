"""A PyTorch Lightning callback that adds a distillation loss to any LightningModule's own.

Add one argument to the trainer:

    Trainer(callbacks=[Distillation(teacher, LocalCorrelationLoss(k=4), {"layer3": "layer3"}, weight=0.01)])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import FeatureCapture

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment, unused-ignore]  # the same class under two names

__all__ = ["Distillation"]


class Distillation(Callback):
    """Run a frozen teacher beside the module's training step and add ``weight * loss(student, teacher)`` to its loss.

    The sum is what ``training_step`` returns to the trainer. So the trainer scales, accumulates, clips and averages the
    term over ranks exactly as it does the module's own loss, in every precision.

    Args:
        teacher: the teacher. It is frozen, takes the module's device and dtype, runs under its autocast, and stays out
            of its checkpoints.
        loss: a function of the student's and the teacher's outputs. They are a tensor each for one pair of layers, and
            a list each for several. If it is a module with parameters, it is trained with the LightningModule: it is a
            part of it while it is fitted, and the first group of the optimiser takes what ``configure_optimizers``
            leaves out. Checkpoints keep its parameters in the callback's state.
        layers: the student's layers by name, and the teacher's layers that they are compared with.
        weight: β.
        inputs: what the teacher takes from a batch: an index, a key, or a function of the batch. A batch that is a
            tensor is taken whole. If a function gives a tuple or a dict, the teacher gets it as its arguments.
        name: what the term is logged as, times its weight.

    With manual optimisation the callback cannot know to which loss the term belongs. ``training_step`` adds it:

        self.manual_backward(loss + self.trainer.callbacks[0].term())

    Raises:
        ValueError: when the fit starts, if a network has no such layer; in the first step, if the loss has parameters
            that nobody trains.
        TypeError: in the first step, if ``inputs`` does not fit the batch, or ``training_step`` returns no loss.
        RuntimeError: in the first step of manual optimisation, if ``term`` was not called.
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss: nn.Module | Callable[[Any, Any], Tensor],
        layers: Mapping[str, str],
        *,
        weight: float = 1.0,
        inputs: int | str | Callable[[Any], Any] = 0,
        name: str = "distillation",
    ) -> None:
        if not layers:
            raise ValueError("layers must name at least one pair of layers, got none")
        self.teacher = teacher.requires_grad_(False).eval()
        self.loss = loss
        self.layers = dict(layers)
        self.weight = weight
        self.inputs = inputs
        self.name = name
        self._undo: list[Callable[[], object]] = []  # what brings the networks back to how they were found
        self._checked = False

    def term(self) -> Tensor:
        """Return the loss of the current batch, times the weight. For manual optimisation, in ``training_step``.

        The student must have run.
        """
        self._used = True
        with torch.no_grad():
            arguments = self._arguments(self._batch)
            if isinstance(arguments, Mapping):
                self.teacher(**arguments)
            else:
                self.teacher(*(arguments if isinstance(arguments, tuple) else (arguments,)))
        student, teacher = self._student.features, self._teacher.features
        several = len(self.layers) > 1
        term = self.weight * (self.loss(student, teacher) if several else self.loss(student[0], teacher[0]))
        if not self._checked:
            self._check_trained(term)
        self._module.log(self.name, term.detach())
        return term

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and isinstance(self.loss, nn.Module) and [*self.loss.parameters(), *self.loss.buffers()]:
            self._join(pl_module, self.loss)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device)
        self._trainer, self._module, self._checked, self._batch = trainer, pl_module, False, None
        self._student = FeatureCapture(pl_module, list(self.layers))
        self._undo.append(self._student.remove)
        self._teacher = FeatureCapture(self.teacher, list(self.layers.values()))
        self._undo.append(self._teacher.remove)
        if isinstance(self.loss, nn.Module):
            self._optimise(self.loss)
        self._wrap(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = None
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restore()

    @property
    def state_key(self) -> str:
        """Distinguish several callbacks of one trainer by their layers and names."""
        return str(self._generate_state_key(layers=self.layers, name=self.name))

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters of a loss that is trained."""
        return {"loss": self.loss.state_dict()} if isinstance(self.loss, nn.Module) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the parameters of a loss that is trained."""
        if "loss" in state_dict and isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(state_dict["loss"])

    def __getstate__(self) -> dict[str, Any]:
        """Processes that are spawned get the settings and the teacher, and hook the networks themselves."""
        kept = ("teacher", "loss", "layers", "weight", "inputs", "name", "_checked")
        return {**{name: self.__dict__[name] for name in kept}, "_undo": []}

    def _wrap(self, pl_module: Any) -> None:
        """Put this callback's step around the module's own, which the trainer looks up by name in every batch."""
        own = vars(pl_module).get("training_step")  # a compiled module has one
        step: Any = functools.partial(self._step, pl_module.training_step)
        # The trainer reads from the signature of __wrapped__ whether the step takes the number of the batch.
        step.__wrapped__ = getattr(pl_module.training_step, "__wrapped__", pl_module.training_step)
        pl_module.training_step = step
        undo = functools.partial(delattr, pl_module, "training_step")
        self._undo.append(undo if own is None else functools.partial(setattr, pl_module, "training_step", own))

    def _step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._used = False
        self._forget()  # the module is not called itself, which would forget the maps of the step before
        output = training_step(*args, **kwargs)
        if not self._module.automatic_optimization:
            if not self._used:
                raise RuntimeError(
                    "Distillation cannot tell which loss of a manually optimised training_step it belongs to: "
                    "add the callback's term() to one of them, as in self.manual_backward(loss + callback.term())"
                )
            return output
        if output is None:  # the trainer skips such a batch
            return None
        if isinstance(output, Tensor):
            return output + self.term()
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": output["loss"] + self.term()}
        raise TypeError(
            "training_step must return the loss, a dict with the key 'loss', or None to skip the batch, "
            f"got {type(output).__name__}"
        )

    def _arguments(self, batch: Any) -> Any:
        """Return what the teacher is called with."""
        if callable(self.inputs):
            return self.inputs(batch)
        if isinstance(batch, Tensor):
            return batch
        try:
            return batch[self.inputs]
        except (KeyError, IndexError, TypeError):
            keys = f" with the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            raise TypeError(
                f"inputs must say what the teacher takes from a batch, which is a {type(batch).__name__}{keys}: pass "
                f"inputs=key, or a function of the batch; got {self.inputs!r}"
            ) from None

    def _forget(self) -> None:
        self._student.clear()
        self._teacher.clear()

    def _join(self, pl_module: Any, loss: nn.Module) -> None:
        """Make the loss a part of the module, for devices, precision and the averaging of gradients, but not saved."""
        for tensor in (*loss.parameters(), *loss.buffers()):
            # Spawned processes get tensors of callbacks in memory that all of them share, and would all write to it.
            if tensor.device.type == "cpu" and tensor.is_shared():
                tensor.data = tensor.data.clone()
        name = f"{self.name}_loss"
        pl_module.add_module(name, loss)
        saved = pl_module.register_state_dict_post_hook(functools.partial(_leave_out, name))
        loaded = pl_module.register_load_state_dict_post_hook(functools.partial(_do_not_miss, name))
        self._undo += [saved.remove, loaded.remove, functools.partial(delattr, pl_module, name)]

    def _optimise(self, loss: nn.Module) -> None:
        """Give the optimiser what it does not have of the loss's parameters."""
        optimizers = self._trainer.optimizers
        known = {parameter for optimizer in optimizers for parameter in _parameters(optimizer)}
        missing = [p for p in loss.parameters() if p.requires_grad and p not in known]
        if missing and len(optimizers) != 1:
            raise ValueError(
                "loss has parameters that no optimiser trains, and there are several optimisers: give "
                "loss.parameters() to one of them in configure_optimizers"
            )
        if missing:
            # In a group of their own, a scheduler that exists already would not reach them.
            optimizers[0].param_groups[0]["params"].extend(missing)

    def _check_trained(self, term: Tensor) -> None:
        """Raise if the term depends on parameters that no optimizer has, such as parameters of a module inside a
        function.
        """
        self._checked = True
        known = {parameter for optimizer in self._trainer.optimizers for parameter in _parameters(optimizer)}
        known.update(self._module.parameters())
        if any(leaf not in known for leaf in _leaves(term) if isinstance(leaf, nn.Parameter)):
            raise ValueError(
                "loss has parameters that no optimiser trains: pass a module that holds them, not a function "
                "that uses it"
            )

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()


def _leave_out(name: str, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
        del state[key]


def _do_not_miss(name: str, module: nn.Module, incompatible: Any) -> None:
    kept = [key for key in incompatible.missing_keys if f"{name}." not in key]
    incompatible.missing_keys[:] = kept


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of the autograd graph that ends in ``value``."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)
