"""A PyTorch Lightning callback that adds a distillation loss to any LightningModule's own.

One more argument of the trainer:

    Trainer(callbacks=[Distillation(teacher, LocalCorrelationLoss(k=4), {"layer3": "layer3"}, weight=0.01)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import FeatureCapture

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

__all__ = ["Distillation"]


class Distillation(Callback):
    """Run a frozen teacher beside the module's training step and add ``weight * loss(student, teacher)`` to its loss.

    Args:
        teacher: the teacher; it is frozen, moved to the module's device, and stays out of its checkpoints.
        loss: of the student's and the teacher's outputs: a tensor each for one pair of layers, a list each for several.
        layers: the student's layers by name, and the teacher's that they are compared with.
        weight: β.
        inputs: picks the network's input from a batch.
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        layers: Mapping[str, str],
        *,
        weight: float = 1.0,
        inputs: Callable[[Any], Tensor] = lambda batch: batch[0],
    ) -> None:
        if not layers:
            raise ValueError("layers must name at least one pair of layers, got none")
        self.teacher = teacher.requires_grad_(False).eval()
        self.loss = loss
        self.layers = dict(layers)
        self.weight = weight
        self.inputs = inputs

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.teacher.to(pl_module.device)
        self._student = FeatureCapture(pl_module, list(self.layers))
        self._teacher = FeatureCapture(self.teacher, list(self.layers.values()))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._student.remove()
        self._teacher.remove()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = self.inputs(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        with torch.no_grad():
            self.teacher(self._batch)
        student, teacher = self._student.features, self._teacher.features
        extra = self.loss(student, teacher) if len(self.layers) > 1 else self.loss(student[0], teacher[0])
        # The trainer goes on with this tensor, which is its loss divided by the steps it accumulates.
        loss += self.weight * extra / trainer.accumulate_grad_batches
        pl_module.log("distillation", extra.detach())
