"""The loss class of DIST's own repositories on fused kernels: the same arguments, numbers and gradients.

In the file of the trainer that imports ``DIST``, for example ``segmentation/train_kd.py``, replace the line by

    from kdkernels.integrations.dist_kd import DIST
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import checks, functional
from ..nn.base import SettingsModule
from ..ops import dist

__all__ = ["DIST"]


@dataclass(eq=False, repr=False)
class DIST(SettingsModule):
    """Compare logits b x K, or b x K x h x w for segmentation, by ``kdkernels.dist_loss``.

    Examples:
        >>> import torch
        >>> from kdkernels.integrations.dist_kd import DIST
        >>> DIST(beta=2.0, gamma=2.0)(torch.randn(2, 19, 8, 8), torch.randn(2, 19, 8, 8)).shape
        torch.Size([])
    """

    beta: float = 1.0
    gamma: float = 1.0
    tau: float = 1.0

    def check(self) -> None:
        super().check()
        dist.check_settings(self.beta, self.gamma)
        checks.positive("tau", self.tau)

    def forward(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        if z_s.dim() == 4:
            z_s, z_t = z_s.movedim(1, -1), z_t.movedim(1, -1)
        return functional.dist_loss(z_s, z_t, beta=self.beta, gamma=self.gamma, temperature=self.tau)
