"""The losses as modules, a file per method: they hold settings and call ``kdkernels.functional``."""

from . import cckd, companions, icct, lkd
from .cckd import *  # noqa: F403
from .companions import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403

__all__ = sorted([*cckd.__all__, *companions.__all__, *icct.__all__, *lkd.__all__])
