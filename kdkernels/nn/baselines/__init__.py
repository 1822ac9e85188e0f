"""Baselines that the tables of the papers compare with, one file per method."""

from . import adversarial, crd, dml, hkd, irg, mgd, reviewkd, simkd, vid
from .adversarial import *  # noqa: F403
from .crd import *  # noqa: F403
from .dml import *  # noqa: F403
from .hkd import *  # noqa: F403
from .irg import *  # noqa: F403
from .mgd import *  # noqa: F403
from .reviewkd import *  # noqa: F403
from .simkd import *  # noqa: F403
from .vid import *  # noqa: F403

_files = (adversarial, crd, dml, hkd, irg, mgd, reviewkd, simkd, vid)
__all__ = sorted(name for file in _files for name in file.__all__)
