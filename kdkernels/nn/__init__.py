"""The losses as modules, with one file per method.

A module holds the settings of a loss and calls its function in ``kdkernels.functional``.

Examples:
    >>> import torch
    >>> from kdkernels import nn
    >>> losses = torch.nn.ModuleList([nn.KDLoss(temperature=4.0), nn.InterClassCorrelationLoss()])
    >>> logits, targets = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> sum(loss(logits, targets) for loss in losses).backward()
"""

from . import baselines, cckd, companions, features, icct, lkd, logits, semckd, tokens
from .baselines import *  # noqa: F403
from .cckd import *  # noqa: F403
from .companions import *  # noqa: F403
from .features import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403
from .logits import *  # noqa: F403
from .semckd import *  # noqa: F403
from .tokens import *  # noqa: F403

_files = (baselines, cckd, companions, features, icct, lkd, logits, semckd, tokens)
__all__ = sorted(name for file in _files for name in file.__all__)
