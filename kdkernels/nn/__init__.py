"""The losses as modules, a file per method: they hold settings and call ``kdkernels.functional``."""

from . import cckd, companions, features, icct, lkd, semckd
from .cckd import *  # noqa: F403
from .companions import *  # noqa: F403
from .features import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403
from .semckd import *  # noqa: F403

_files = (cckd, companions, features, icct, lkd, semckd)
__all__ = sorted(name for file in _files for name in file.__all__)
