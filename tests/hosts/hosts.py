"""What the tests of real hosts share."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def make_torchvision_importable() -> None:
    """Declare the operators that torchvision wants to exist, where torchvision's own library cannot be loaded.

    The wheels of torchvision on PyPI are built for CUDA. Beside a PyTorch for the CPU their library does not load, and
    the import fails with "operator torchvision::nms does not exist". timm and torchdistill import torchvision, but what
    is tested here needs none of its operators.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # whoever needs it is skipped
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        runpy.run_path(str(FOLDER / "site" / "sitecustomize.py"))
        # Python runs this file first in the processes that are started from here.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER / "site"), os.environ.get("PYTHONPATH", "")])


def torchrun(processes: int, *command: str) -> str:
    """Return what the processes wrote. Fail if one of them does."""
    path = os.pathsep.join([str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
