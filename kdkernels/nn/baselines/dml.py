"""Deep mutual learning (DML): networks that train together and teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks, functional
from ...ops.kd import check_settings
from ...types import Backend
from ..base import SettingsModule
from . import shapes

__all__ = ["DMLLoss"]


@dataclass(eq=False, repr=False)
class DMLLoss(SettingsModule):
    """Add to the cross-entropy of each network its divergence from the other networks, DML (Zhang et al. 2018).

    The loss of network k of K is ``cross_entropy(z_k, labels) + 1/(K − 1) Σ_l KL(softmax(z_l) ‖ softmax(z_k))``, means
    over the batch. The other networks are constants in it, so the sum of all losses trains every network with its own
    loss. The divergence is ``kdkernels.kd_loss``. In the paper, each network makes its step before the next network's
    loss is computed. To do so, compute the logits again and take one entry of the result.

    Args:
        temperature: T > 0 of the divergence, which is multiplied by T². The paper has T = 1.
        backend: what computes the divergence: "auto", "reference", "native", "triton" or "library".

    Examples:
        >>> import torch
        >>> from kdkernels.nn import DMLLoss
        >>> logits = [torch.randn(64, 100, requires_grad=True) for _ in range(2)]
        >>> losses = DMLLoss()(logits, torch.randint(100, (64,)))
        >>> losses.shape
        torch.Size([2])
        >>> losses.sum().backward()
    """

    _: KW_ONLY
    temperature: float = 1.0
    backend: Backend = "auto"

    def check(self) -> None:
        super().check()
        check_settings(self.temperature)

    def forward(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of each network, K numbers: float64 if an input is float64, otherwise float32.

        Args:
            logits: the b x C logits of each of the K >= 2 networks.
            labels: b class indices, of any integer dtype.

        Raises:
            TypeError: if an argument has the wrong type. The message names the argument, what was expected and what it
                got.
            ValueError: if a shape or a setting does not fit, with the same parts in the message.
        """
        self.check()
        networks = shapes.layers("logits", logits)
        if len(networks) < 2:
            raise ValueError(f"logits must hold at least 2 networks, got {len(networks)}")
        for index, own in enumerate(networks):
            checks.tensor(f"logits[{index}]", own, 2, "b x C")
            checks.same_device(f"logits[{index}]", own, "logits[0]", networks[0])
            if own.shape != networks[0].shape:
                raise ValueError(f"logits[{index}] must have shape {tuple(networks[0].shape)}, got {tuple(own.shape)}")
        labels = checks.labels(labels, networks[0])
        losses = []
        for index, own in enumerate(networks):
            others = networks[:index] + networks[index + 1 :]
            divergences = [self._divergence(own, other) for other in others]
            mimicry = torch.stack(divergences).mean()
            with torch.autocast(own.device.type, enabled=False):
                losses.append(F.cross_entropy(own.to(mimicry.dtype), labels) + mimicry)
        return torch.stack(losses)

    def _divergence(self, own: Tensor, other: Tensor) -> Tensor:
        return functional.kd_loss(own, other.detach(), temperature=self.temperature, backend=self.backend)
