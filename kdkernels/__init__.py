"""Fused kernels for correlation-based knowledge distillation."""

from . import functional, nn, samplers
from .backends import use_backend
from .explanation import explain
from .functional import *  # noqa: F403
from .functional import __all__ as _functions

__version__ = "0.1.0"
__all__ = [*_functions, "explain", "functional", "nn", "samplers", "use_backend"]
