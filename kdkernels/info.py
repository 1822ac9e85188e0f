"""``python -m kdkernels.info``: versions, devices, the backends that run, and why other backends do not."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__, backends, native
from .types import BACKENDS


def rows() -> Iterator[tuple[str, str]]:
    """Yield the lines of the report as (name, value)."""
    yield "kdkernels", __version__
    yield "Python", platform.python_version()
    yield "PyTorch", torch.__version__
    yield "Triton", _version("triton")
    yield "processor", f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield "native libraries", ", ".join(path.name for path in native.built()) or "none"
    yield "  in use", "none" if native.why_not(torch.device("cpu")) else native.cpu_library().name
    yield "  compiler", ", ".join(sorted({_compiler(path) for path in native.built()})) or "none"
    yield "  CUDA architectures", ", ".join(_architectures(native.cuda_library())) or "none"
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        yield f"GPU {index}", torch.cuda.get_device_name(index)
    if len(devices) == 1:
        yield "GPU", "none"
    for backend in BACKENDS[1:]:
        for device in devices:
            reason = backends.why_not(backend, torch.empty(0, device=device))
            yield f"{backend} on {device}", "runs" if reason is None else f"does not run: {reason}"


def main() -> None:
    report = list(rows())
    width = max(len(name) for name, _ in report)
    for name, value in report:
        print(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def _compiler(library: Path) -> str:
    """Return the version that the compiler wrote into the library."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return found[0].decode() if found else "unknown"


def _architectures(library: Path) -> list[str]:
    """Return the architectures for which nvcc generated code, as its tools wrote into the library."""
    found = re.findall(rb"-arch (sm_\d+a?) -m 64 \0", library.read_bytes()) if library.exists() else []
    return sorted({name.decode() for name in found}, key=lambda name: int(re.sub(r"\D", "", name)))


if __name__ == "__main__":
    main()
