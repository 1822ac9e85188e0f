"""The losses as modules, a file per method: they hold settings and call ``kdkernels.functional``."""

from . import companions, icct, lkd
from .companions import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403

__all__ = sorted([*companions.__all__, *icct.__all__, *lkd.__all__])
