"""The losses as functions, a file per method: student first, teacher second, settings by keyword."""

from . import companions, icct, lkd
from .companions import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403

__all__ = sorted([*companions.__all__, *icct.__all__, *lkd.__all__])
