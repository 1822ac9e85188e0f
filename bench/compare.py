"""LKD's loss against the textbook's at the paper's sizes: time of forward + backward, and peak extra memory.

``make demo`` ends with it. ``pytest bench`` measures more sizes, and the other operators.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench_congruence import PAPER, VARIANTS, Case
from measure import SECONDS, compiled, medians, peaks, provenance, table
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="measure the baselines under torch.compile too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the measurement of each size")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    baselines = {name: loss for name, loss in VARIANTS.items() if name != "fused"}
    variants = VARIANTS | (compiled(baselines) if arguments.compile else {})
    results, rows = [], []
    for case in tqdm(PAPER, desc="fused against textbook", leave=False):
        times = medians(variants, case.inputs(), arguments.seconds)
        memory = peaks(VARIANTS, Case.inputs, case)
        results.append({"case": str(case), "seconds": times, "peak extra bytes": memory})
        for name, seconds in times.items():
            extra = f"{memory[name] / 2**20:.0f} MiB" if name in memory else ""
            ratio = f"{seconds / times['fused']:.1f}x"
            rows.append((str(case) if name == "fused" else "", name, f"{seconds * 1e3:.2f} ms", ratio, extra))
    print("\nOne loss, forward and backward: medians of interleaved repeats, and the memory it needs at its peak.\n")
    print(table(("LKD at", "", "time", "of fused", "extra memory"), rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
