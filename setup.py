"""Builds the native CPU libraries with ninja; everything else about the package is in pyproject.toml.

The sources in csrc/ are compiled once per instruction set into complete libraries, of which ``kdkernels.native`` loads
the one that fits the processor. They use PyTorch's stable ABI and no Python symbol: one build serves every later torch
and every Python.

KDKERNELS_BUILD=1 makes a failed build an error, KDKERNELS_BUILD=0 skips it; otherwise the package is installed without.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
OLDEST_TORCH = (2, 11)
# The two warnings that are off are false alarms of GCC 12 in its own AVX-512 intrinsics (its bug 105593).
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized "
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
)
X86_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mamx-tile -mamx-bf16",
    "avx2": "-mavx2 -mfma -mf16c",
    "default": "",
}


class BuildError(Exception):
    """Why the native libraries cannot be built, in one sentence."""


class BuildNative(build_ext):
    def run(self) -> None:
        wish = os.environ.get("KDKERNELS_BUILD", "")
        if wish == "0":
            return
        target = Path("kdkernels") if self.inplace else Path(self.build_lib, "kdkernels")
        try:
            libraries = compile_libraries()
        except BuildError as error:
            if wish == "1":
                sys.exit(f"kdkernels: {error}")
            self.warn(f"installing kdkernels without its native kernels: {error}")
            libraries = []
        for old in target.glob("_native_cpu_*.so"):
            old.unlink()
        for library in libraries:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))]


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_libraries() -> list[Path]:
    """Compile what changed since the last build, and return every library."""
    if sys.platform != "linux":
        raise BuildError(f"they are built on Linux only, this is {sys.platform}")
    ninja = find_tool("ninja", "ninja is not installed (pip install ninja)")
    compiler = find_tool(os.environ.get("CXX", "g++"), "there is no C++ compiler g++ (set CXX to name another)")
    folder = ROOT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    flags = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"default": ""}
    (folder / "build.ninja").write_text(ninja_file(compiler, find_torch(), flags))
    if subprocess.run([ninja, "-C", str(folder)]).returncode:
        raise BuildError("the compiler failed, its messages are above (pip shows them with --verbose)")
    return [folder / library_name(isa) for isa in flags]


def library_name(isa: str) -> str:
    return f"_native_cpu_{isa}.so"


def ninja_file(compiler: str, torch: Path, flags: dict[str, str]) -> str:
    lines = [
        f"cxx = {compiler}",
        f"flags = {CXX_FLAGS} -isystem {escape(torch / 'include')} {os.environ.get('CXXFLAGS', '')}",
        f"libs = -L{escape(torch / 'lib')} -ltorch_cpu",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $cxx -shared -Wl,-z,defs $in $libs -o $out",
        "  description = $out",
    ]
    for isa, isa_flags in flags.items():
        objects = {f"{isa}/{path.relative_to(ROOT / 'csrc').with_suffix('.o')}": path for path in SOURCES}
        for output, source in objects.items():
            lines += [f"build {output}: compile {escape(source)}", f"  isa = {isa_flags}"]
        lines.append(f"build {library_name(isa)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_tool(name: str, otherwise: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
    if found is None:
        raise BuildError(otherwise)
    return found


def find_torch() -> Path:
    """The folder of the torch to build against, found without importing it.

    An isolated build hides the environment the package is going to, so that is searched as well.
    """
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for distribution in importlib.metadata.distributions(name="torch", path=places):
        torch = Path(str(distribution.locate_file("torch")))
        if tuple(int(part) for part in distribution.version.split(".")[:2]) < OLDEST_TORCH:
            raise BuildError(f"torch {distribution.version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        if (torch / "include").is_dir():
            return torch
    raise BuildError("torch is not installed (install it first, or use pip install --no-build-isolation)")


setup(
    ext_modules=[Extension("kdkernels._native", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
