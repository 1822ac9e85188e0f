"""LKD against the textbook version at the sizes of the paper: time of forward + backward, and peak extra memory.

``make demo`` begins with it. ``make bench`` measures more sizes, every operator, and all of them under torch.compile.
"""

from __future__ import annotations

import argparse

from bench_congruence import PAPER
from measure import SECONDS, medians, peaks, table
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the measurement of each size")
    arguments = parser.parse_args()
    rows = []
    for case in tqdm(PAPER, desc="fused against textbook", leave=False):
        variants = {"fused": case.fused, **case.baselines}
        times = medians(variants, case.inputs(*case.arguments), arguments.seconds)
        memory = peaks(variants, case.inputs, *case.arguments)
        for name, seconds in times.items():
            ratio = f"{seconds / times['fused']:.1f}x"
            cells = f"{seconds * 1e3:.2f} ms", ratio, f"{memory[name] / 2**20:.0f} MiB"
            rows.append((str(case) if name == "fused" else "", name, *cells))
    print("\nOne loss, forward and backward: medians of interleaved repeats, and the memory it needs at its peak.\n")
    print(table(("", "", "time", "of fused", "extra memory"), rows))


if __name__ == "__main__":
    main()
