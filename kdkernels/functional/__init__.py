"""The losses as functions, with one file per method.

The student comes first, the teacher second, and settings are keywords.

Examples:
    >>> import torch
    >>> from kdkernels import functional
    >>> logits, targets = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> loss = functional.kd_loss(logits, targets) + functional.inter_class_correlation_loss(logits, targets)
    >>> loss.backward()
"""

from .. import metrics
from ..metrics import *  # noqa: F403
from . import cckd, companions, icct, lkd, logits, semckd, tokens
from .cckd import *  # noqa: F403
from .companions import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403
from .logits import *  # noqa: F403
from .semckd import *  # noqa: F403
from .tokens import *  # noqa: F403

_files = (cckd, companions, icct, lkd, logits, metrics, semckd, tokens)
__all__ = sorted(name for file in _files for name in file.__all__)
