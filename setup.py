"""Build the native libraries with ninja. Everything else about the package is in pyproject.toml.

The sources in csrc/cpu are compiled once per instruction set, each into a complete library. ``kdkernels.native`` loads
the library that fits the processor. The sources in csrc/cuda are compiled into one library if the installed torch has
CUDA, with or without a GPU in this machine. The libraries use PyTorch's stable ABI and no Python symbols, so one build
serves every later torch and every Python.

KDKERNELS_BUILD=1 makes a failed build an error. KDKERNELS_BUILD=0 skips the build. Otherwise the package is installed
without the libraries. PyTorch's usual package has CUDA even without a CUDA compiler, so a missing compiler is an error
only with KDKERNELS_BUILD=cuda. KDKERNELS_CUDA_ARCHS, such as "80;90", names the architectures to compile for.
KDKERNELS_CUDA_VERSION, such as "13.0", compiles the CUDA sources against a torch without CUDA, for a machine whose
torch has this CUDA. KDKERNELS_CPU_ISAS, such as "avx2", names the instruction sets. "native" is the one that PyTorch
would choose on this processor.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(ROOT.glob("csrc/cpu/*.cpp"))
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
OLDEST_TORCH = (2, 11)
TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
# The two disabled warnings are false alarms of GCC 12 in its own AVX-512 intrinsics (GCC bug 105593).
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    f"-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized {TARGET}"
)
X86_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mamx-tile -mamx-int8",
    "avx2": "-mavx2 -mfma -mf16c",
    "default": "",
}
CUDA_FLAGS = f"-std=c++17 -O3 -DUSE_CUDA {TARGET} -Xcompiler -fPIC -Xcompiler -fvisibility=hidden"
CUDA_ARCHITECTURES = "80;86;89;90;100;120"
CUDA_LIBRARY = "_native_cuda.so"


class BuildError(Exception):
    """Why the native libraries cannot be built, in one sentence."""


class NoCompilerError(BuildError):
    """There is no CUDA compiler, or its version differs from torch's build."""


class BuildNative(build_ext):
    def run(self) -> None:
        wish = os.environ.get("KDKERNELS_BUILD", "")
        if wish == "0":
            return
        target = Path("kdkernels") if self.inplace else Path(self.build_lib, "kdkernels")
        libraries = self.attempt(compile_cpu, "its native kernels", wish)
        libraries += self.attempt(compile_cuda, "its CUDA kernels", wish)
        for old in target.glob("_native_*.so"):
            old.unlink()
        for library in libraries:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)

    def attempt(self, build: Callable[[], list[Path]], what: str, wish: str) -> list[Path]:
        try:
            if sys.platform != "linux":
                raise BuildError(f"they are built on Linux only, this is {sys.platform}")
            return build()
        except BuildError as error:
            if wish == "cuda" or (wish == "1" and not isinstance(error, NoCompilerError)):
                sys.exit(f"kdkernels: {error}")
            self.warn(f"installing kdkernels without {what}: {error}")
            return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))]


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_cpu() -> list[Path]:
    """Compile changed sources, and return all libraries."""
    compiler = find_tool(os.environ.get("CXX", "g++"), "there is no C++ compiler g++ (set CXX to name another)")
    flags = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"default": ""}
    wanted = os.environ.get("KDKERNELS_CPU_ISAS")
    if wanted:
        names = {native_isa() if name == "native" else name for name in wanted.split(";")}
        if not names & flags.keys():
            raise BuildError(f"KDKERNELS_CPU_ISAS must name some of {';'.join(flags)}, got {wanted}")
        flags = {isa: flags[isa] for isa in flags if isa in names}
    return run_ninja("native", ninja_file(compiler, find_torch(), flags), [name_of_library(isa) for isa in flags])


def native_isa(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the instruction set whose library ``kdkernels.native`` loads on this processor."""
    named = os.environ.get("ATEN_CPU_CAPABILITY")
    if named:
        return named
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}:
        return "avx512"
    return "avx2" if flags >= {"avx2", "fma"} else "default"


def compile_cuda() -> list[Path]:
    """Do the same for CUDA, if the installed torch has CUDA."""
    torch = find_torch()
    own = cuda_version(torch)
    version = own or os.environ.get("KDKERNELS_CUDA_VERSION")
    if version is None:
        if os.environ.get("KDKERNELS_BUILD") == "cuda":
            raise BuildError("the torch that is installed has no CUDA")
        return []
    return run_ninja("cuda", cuda_ninja_file(find_nvcc(version), torch, own is None), [CUDA_LIBRARY])


def run_ninja(name: str, content: str, libraries: list[str]) -> list[Path]:
    ninja = find_tool("ninja", "ninja is not installed (pip install ninja)")
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(content)
    if subprocess.run([ninja, "-C", str(folder)]).returncode:
        raise BuildError("the compiler failed, its messages are above (pip shows them with --verbose)")
    return [folder / library for library in libraries]


def name_of_library(isa: str) -> str:
    return f"_native_cpu_{isa}.so"


def ninja_file(compiler: str, torch: Path, flags: dict[str, str]) -> str:
    lines = [
        f"cxx = {compiler}",
        f"flags = {CXX_FLAGS} -isystem {escape(torch / 'include')} {os.environ.get('CXXFLAGS', '')}",
        f"libs = -L{escape(torch / 'lib')} -ltorch_cpu {os.environ.get('LDFLAGS', '')}",
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
        lines.append(f"build {name_of_library(isa)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_ninja_file(nvcc: str, torch: Path, for_another_torch: bool = False) -> str:
    architectures = re.findall(r"\d+a?", os.environ.get("KDKERNELS_CUDA_ARCHS") or CUDA_ARCHITECTURES)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    portable = "90" if "90" in architectures else architectures[-1]  # later GPUs compile this PTX when they load it
    targets.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
    lines = [
        f"nvcc = {escape(Path(nvcc))} {nvcc_host_compiler()}",
        f"flags = {CUDA_FLAGS} {' '.join(targets)} --threads {len(targets)} -isystem {escape(torch / 'include')}",
        f"libs = {cuda_libraries(torch, for_another_torch)}",
        "rule compile",
        "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $nvcc -shared $in $libs -o $out",
        "  description = $out",
    ]
    objects = {f"{path.stem}{path.suffix[1:]}.o": path for path in CUDA_SOURCES}
    lines += [f"build {output}: compile {escape(source)}" for output, source in objects.items()]
    lines.append(f"build {CUDA_LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_libraries(torch: Path, for_another_torch: bool) -> str:
    """Return the linker's arguments. A torch without CUDA lacks symbols, which the torch of the other machine has."""
    if for_another_torch:
        return f"-L{escape(torch / 'lib')} -ltorch_cpu"
    return f"-L{escape(torch / 'lib')} -ltorch_cuda -ltorch_cpu -Xlinker -z -Xlinker defs"


def nvcc_host_compiler() -> str:
    return f"-ccbin {os.environ['CXX']}" if "CXX" in os.environ else ""


def cuda_version(torch: Path) -> str | None:
    """Return the CUDA version of torch's build, or None."""
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found and (torch / "lib" / "libtorch_cuda.so").exists() else None


def find_nvcc(wanted: str) -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] or ["/usr/local/cuda"]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise NoCompilerError("there is no CUDA compiler nvcc (set CUDA_HOME to the folder of a CUDA toolkit)")
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", report)
    if found is None or found[1] != wanted.split(".")[0]:
        version = f"CUDA {found[1]}.{found[2]}" if found else "an unknown version"
        raise NoCompilerError(
            f"torch was built with CUDA {wanted}, but {nvcc} is of {version} (set CUDA_HOME to another)"
        )
    return nvcc


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def find_tool(name: str, otherwise: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
    if found is None:
        raise BuildError(otherwise)
    return found


def find_torch() -> Path:
    """Return the folder of the torch to build with, found without an import.

    An isolated build hides the target environment, so this environment is searched too.
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
    # For example "+cpu", which distinguishes wheels of one version on an index or a release page.
    options={"egg_info": {"tag_build": os.environ.get("KDKERNELS_VERSION_LABEL", "")}},
    ext_modules=[Extension("kdkernels._native", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
