"""Fused kernels for correlation-based knowledge distillation."""

from . import functional, nn, samplers
from .backends import load_operators, use_backend
from .explanation import explain

# From the files themselves, because type checkers do not read a computed list of names, and functional has one.
from .functional.cckd import *  # noqa: F403
from .functional.companions import *  # noqa: F403
from .functional.icct import *  # noqa: F403
from .functional.lkd import *  # noqa: F403
from .functional.logits import *  # noqa: F403
from .functional.semckd import *  # noqa: F403
from .functional.tokens import *  # noqa: F403
from .metrics import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["explain", "functional", "load_operators", "nn", "samplers", "use_backend"]
__all__ += functional.__all__
