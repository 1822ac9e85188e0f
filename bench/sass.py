"""Count the instructions of product loops per tensor-core instruction: ``python bench/sass.py FILE``, an object file.

A multiprocessor issues one instruction per scheduler and cycle, so a loop with many other instructions per HMMA leaves
tensor cores idle. The loop is the innermost one with an HMMA. It is counted as it stands in the machine code, with all
branches, so the counts are upper bounds.

It needs ``cuobjdump`` and ``nvdisasm`` in PATH: from the CUDA toolkit, or from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from measure import table

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")


class Loop(NamedTuple):
    """The innermost loop of a kernel that has tensor-core instructions."""

    kernel: str
    instructions: int
    products: int
    counts: Counter[str]

    @property
    def ratio(self) -> float:
        return self.instructions / self.products


def loops(sass: str) -> list[Loop]:
    """Return the product loop of each kernel that has one."""
    found = []
    for function in sass.split("Function : ")[1:]:
        name, _, rest = function.partition("\n")
        code = [(int(address, 16), PREDICATE.sub("", text)) for address, text in INSTRUCTION.findall(rest)]
        places = {address: place for place, (address, _) in enumerate(code)}
        products = [place for place, (_, text) in enumerate(code) if "HMMA" in text]
        candidates = []
        for end, (address, text) in enumerate(code):
            target = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
            begin = places.get(int(target[1], 16)) if target else None
            backward = begin is not None and code[begin][0] < address
            if backward and any(begin <= place <= end for place in products):
                candidates.append((end - begin, begin))
        if candidates:
            length, begin = min(candidates)
            names = Counter(text.split()[0].split(".")[0] for _, text in code[begin : begin + length + 1])
            found.append(Loop(name.strip(), length + 1, names["HMMA"], names))
    return found


def disassembled(file: Path, architecture: str) -> str:
    tool = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if tool is None:
        sys.exit("there is no cuobjdump; install the CUDA toolkit or the package nvidia-cuda-cuobjdump, with nvdisasm")
    command = [tool, "-sass", "-arch", architecture, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an object file or a library with CUDA code")
    parser.add_argument("--architecture", default="sm_90")
    arguments = parser.parse_args()
    rows = []
    for loop in loops(disassembled(arguments.file, arguments.architecture)):
        most = ", ".join(f"{count} {name}" for name, count in loop.counts.most_common(6))
        rows.append((most, str(loop.instructions), str(loop.products), f"{loop.ratio:.1f}", loop.kernel[13:60]))
    print(table(("most frequent", "instructions", "HMMA", "per HMMA", "kernel"), rows))


if __name__ == "__main__":
    main()
