"""Run every example with its defaults. The tables of docs/examples.md show the results.

    python bench/examples.py && python bench/report.py

The program writes the tables with machine, versions, commit and date to bench/results/examples. An example whose folder
exists is not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import results
from measure import provenance

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {  # keys: the names of the files
    "lkd": ("train_lkd.py",),
    "cckd": ("train_cckd.py",),
    "cckd-retrieval": ("train_cckd.py", "--task", "retrieval"),
    "icct": ("train_icct.py",),
    "semckd": ("train_semckd.py",),
    "tokens": ("train_tokens.py",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="only these examples")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="default: %(default)s")
    arguments = parser.parse_args()
    origin = provenance()  # first, because the program changes files of the working tree
    for name in arguments.only:
        script, *options = EXAMPLES[name]
        folder = arguments.out / name
        command = [sys.executable, ROOT / "examples" / script, *options, "--threads", "1", "--out", folder]
        subprocess.run(command, check=True)
        tables = results.read(folder / "results.json")["tables"]
        results.write(ROOT / "bench" / "results" / "examples" / f"{name}.json", origin | {"tables": tables})


if __name__ == "__main__":
    main()
