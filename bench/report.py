"""Writes the tables and figures of the documentation from bench/results: ``python bench/report.py``.

A page says where with a pair of comments, between which everything is replaced::

    <!-- results: lkd-cpu-2026-11-21.json -->
    <!-- end -->

``--check`` changes nothing and fails if a page is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- results: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BATCH = ("n", "b", "batch")  # what benchmarks call the number of images

Result = dict[str, Any]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str) -> str:
    """The page with every table as its measurements have it."""
    return PLACE.sub(lambda place: place[1] + section(RESULTS / place["file"]) + place[3], page)


def section(file: Path) -> str:
    """Table and provenance of one file of results."""
    measured = json.loads(file.read_text())
    cases = [result for result in measured["results"] if result.get("headline", True)]
    header, rows = (error_table if "errors" in cases[0] else time_table)(cases)
    lines = map(row, [header, ["---", *["---:"] * (len(header) - 1)], *rows])
    origin = (
        f"{measured['processor']}, PyTorch {measured['PyTorch']}, {measured['date'][:10]}, "
        f"commit {measured['commit']}; `bench/results/{file.name}`."
    )
    return "\n".join(["", *lines, "", origin, ""])


def error_table(cases: list[Result]) -> tuple[list[str], list[list[str]]]:
    """What bench/precision.py measures: errors of loss and gradient by kind of input."""
    kinds = list(cases[0]["errors"])
    rows = [
        [case["case"], *(f"{case['errors'][kind][what]:.0e}" for kind in kinds for what in ("loss", "gradient"))]
        for case in cases
    ]
    rounding = [f"{max(case['errors'][kind]['rounded'] for case in cases):.0e}" for kind in kinds]
    rows.append(["the exact gradient, rounded", *(cell for value in rounding for cell in ("", value))])
    return ["", *(f"{kind}: {what}" for kind in kinds for what in ("loss", "gradient"))], rows


def time_table(cases: list[Result]) -> tuple[list[str], list[list[str]]]:
    quantities = {key for case in cases for key in case}
    columns = ["forward + backward", "fused", "best eager", "best compiled", "ratio to the best"]
    columns += ["peak extra memory, fused / eager"] * any("peak extra bytes" in case for case in cases)
    columns += ["of the machine's limit"] * any("share of the limit" in case for case in cases)
    return columns, [cells(case, quantities) for case in cases]


def cells(case: Result, measured: set[str]) -> list[str]:
    seconds = dict(case["seconds"])
    fused = seconds.pop("fused")
    eager, compiled = (
        min((time for name, time in seconds.items() if name.endswith(", compiled") == wanted), default=None)
        for wanted in (False, True)
    )
    best = min(seconds.values())
    row = [case["case"], f"**{duration(fused)}**", duration(eager), duration(compiled), f"{best / fused:.2f}x"]
    if "peak extra bytes" in measured:
        peaks = dict(case.get("peak extra bytes", {}))
        own = peaks.pop("fused", None)
        row.append(f"{mebibytes(own)} / {mebibytes(min(peaks.values()))} MiB" if peaks else "")
    if "share of the limit" in measured:
        row.append(f"{case['share of the limit']:.0%}" if "share of the limit" in case else "")
    return row


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def plot(file: Path, folder: Path) -> Path | None:
    """Time, memory and share of the limit against the batch, for each setting measured at several batches."""
    import matplotlib.pyplot as plt

    groups: dict[str, list[Result]] = defaultdict(list)
    for result in json.loads(file.read_text())["results"]:
        parameters = dict(result.get("parameters", {}))
        batch = next((parameters.pop(name) for name in BATCH if name in parameters), None)
        if batch is not None:
            groups[", ".join(f"{name} = {value}" for name, value in parameters.items())].append(result | {"x": batch})
    groups = {name: sorted(group, key=lambda r: r["x"]) for name, group in groups.items() if len(group) >= 3}
    if not groups:
        return None
    figure, axes = plt.subplots(
        3, len(groups), figsize=(3.4 * len(groups), 8), sharex="col", squeeze=False, layout="constrained"
    )
    for column, (name, group) in zip(axes.T, groups.items(), strict=True):
        column[0].set_title(name, fontsize=9)
        variants = list(dict.fromkeys(variant for result in group for variant in result["seconds"]))
        for quantity, axis in (("seconds", column[0]), ("peak extra bytes", column[1])):
            for variant in variants:
                points = [(r["x"], r[quantity][variant]) for r in group if variant in r.get(quantity, {})]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", label=variant, lw=2 if variant == "fused" else 1)
        shares = [(r["x"], r["share of the limit"]) for r in group if "share of the limit" in r]
        if shares:
            column[2].semilogx(*zip(*shares, strict=True), "o-")
        column[2].set_ylim(0, 1)
        column[2].set_xlabel("batch")
    for axis, label in zip(axes[:, 0], ("seconds", "peak extra bytes", "share of the limit"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=7)
    target = folder / file.with_suffix(".png").name
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a page is not up to date")
    arguments = parser.parse_args()
    stale = [page for page in pages() if filled(page.read_text()) != page.read_text()]
    if arguments.check:
        sys.exit(f"not up to date: {', '.join(page.name for page in stale)}" if stale else 0)
    for page in stale:
        page.write_text(filled(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")
    for file in sorted(RESULTS.glob("*.json")):
        figure = plot(file, RESULTS)
        if figure:
            print(f"wrote {figure.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
