"""mmrazor's channel-wise distillation on fused kernels, under its own name. Add one line to a configuration:

    custom_imports = dict(imports=["kdkernels.integrations.mmrazor"], allow_failed_imports=False)

``ChannelWiseDivergence`` of its registry is then this class. It takes mmrazor's arguments and returns its number and
gradient.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, nn

from ..functional import channel_wise_loss

__all__ = ["ChannelWiseDivergence"]


class ChannelWiseDivergence(nn.Module):
    """mmrazor's ChannelWiseDivergence: ``loss_weight · τ² · KL`` of the channels' positions, per channel and sample."""

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Return the loss of N x C x H x W predictions of student and teacher."""
        return self.loss_weight * channel_wise_loss(preds_S, preds_T, temperature=self.tau)


if find_spec("mmrazor") is not None:
    from mmrazor.registry import MODELS

    MODELS.register_module(module=ChannelWiseDivergence, force=True)
