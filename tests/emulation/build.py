"""Compile csrc/cuda for the CPU, with threads emulated by ``emulation.h``, and register its operators for CPU tensors.

They are ``torch.ops.kdkernels_emulated.<op>``, with the schemas of ``csrc/cpu``. Launchers and kernels are the
same sources that nvcc compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import library

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulation"
HERE = Path(__file__).parent
SOURCES = [*sorted(ROOT.glob("csrc/cuda/*.cu")), *sorted(HERE.glob("*.cu"))]
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -Wall -Wno-unknown-pragmas -ffp-contract=off"
    " -DKDKERNELS_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
    # A GPU reads vectors only at multiples of their size. Without these flags, a CPU reads them anywhere.
    " -fsanitize=alignment -fsanitize-undefined-trap-on-error"
)
operators = library.Library("kdkernels_emulated", "DEF")
ORDERS = ("forward", "reverse", "random")


def why_not() -> str | None:
    """Return why the emulation cannot be built here, in one sentence, or None if it can."""
    if sys.platform != "linux":
        return f"the emulation is for Linux, this is {sys.platform}"
    for tool in (compiler(), "ninja"):
        if find(tool) is None:
            return f"{tool} is not installed"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def find(tool: str) -> str | None:
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the changed sources and load the library."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist share the folder
        (FOLDER / "build.ninja").write_text(ninja_file())
        done = subprocess.run([find("ninja"), "-C", FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    path = FOLDER / "emulation.so"
    # The CPU library is loaded already and has defined the schemas.
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("kdkernels::"):
            operators.define(str(schema).removeprefix("kdkernels::"))
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def ninja_file() -> str:
    torch_folder = Path(torch.__file__).parent
    lines = [
        f"cxx = {find(compiler())}",
        f"flags = {FLAGS} -I{HERE} -I{ROOT / 'csrc/cuda'} -isystem {torch_folder / 'include'}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -Wl,-z,defs $in -L{torch_folder / 'lib'} -ltorch_cpu -o $out",
    ]
    objects = {f"{source.stem}{source.suffix[1:]}.o": source for source in SOURCES}
    lines += [f"build {name}: compile {source}" for name, source in objects.items()]
    lines.append(f"build emulation.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def set_order(order: str, seed: int = 0) -> None:
    """Set the order in which the threads of a block and the blocks of a grid run."""
    load().set_order(ORDERS.index(order), ctypes.c_uint64(seed))


def launches() -> int:
    """Return how many kernels have been launched since the last call."""
    return load().launches()


@contextlib.contextmanager
def only_counting() -> Iterator[None]:
    """Only count launches in the block, so that sizes do not matter. The launches write nothing."""
    load().only_count(ctypes.c_bool(True))
    try:
        yield
    finally:
        load().only_count(ctypes.c_bool(False))
