"""The losses as functions, a file per method: student first, teacher second, settings by keyword."""

from .. import metrics
from ..metrics import *  # noqa: F403
from . import cckd, companions, icct, lkd, semckd
from .cckd import *  # noqa: F403
from .companions import *  # noqa: F403
from .icct import *  # noqa: F403
from .lkd import *  # noqa: F403
from .semckd import *  # noqa: F403

__all__ = sorted([*cckd.__all__, *companions.__all__, *icct.__all__, *lkd.__all__, *metrics.__all__, *semckd.__all__])
