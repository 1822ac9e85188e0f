"""Writes the tables and figures of the documentation from bench/results: ``python bench/report.py``.

A page says where with a pair of comments, between which everything is replaced. They name a file of results, or with
an asterisk any number of them, and the operators whose every case is shown; without one it is the cases that are marked
as headlines, of all operators. A file that has tables already, such as those of the examples, is shown whole::

    <!-- results: cpu.json -->
    <!-- end -->

``--check`` changes nothing and fails if a page is not what it would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import results  # noqa: E402
from common.results import report  # noqa: E402
from results import Result  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- results: (?P<file>\S+)(?P<operators>[^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)
OPERATORS = ("congruence", "patches", "correlation_congruence", "icc", "gram", "feature_mse", "convolution", "semckd")
OPERATORS += ("similarity_preserving", "rkd", "kd")
OVERVIEW = ("congruence", "correlation_congruence", "icc", "rkd")  # whose first curves the overview shows
FUSED, EAGER, COMPILED, STREAMED = "fused", "eager", ", compiled", "KeOps"
LOOP = "row by row"  # as public distillation code computes CCKD
KINDS = {  # of variants, with what figures call them and their colour
    EAGER: ("best eager", "tab:orange"),
    COMPILED: ("best compiled", "tab:green"),
    STREAMED: ("KeOps", "tab:purple"),
    FUSED: ("fused", "tab:blue"),
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str) -> str:
    """The page with every table as its measurements have it."""
    return PLACE.sub(lambda place: place[1] + sections(place["file"], place["operators"].split()) + place[4], page)


def sections(name: str, operators: list[str]) -> str:
    files = sorted(RESULTS.glob(name)) if "*" in name else [RESULTS / name]
    return "".join(section(file, operators) for file in files) or "\nNot yet measured.\n\n"


def section(file: Path, operators: list[str]) -> str:
    """Tables and provenance of a file of results."""
    measured = results.read(file)
    if "tables" in measured:
        return f"\n{report(measured['tables'])}\n\n{origin(file, measured, [measured])}\n"
    if any("errors" in case for case in measured["results"]):
        cases, (header, rows) = [measured], error_table(measured["results"])
    else:
        cases = [case for case in in_order(measured["results"]) if shown(case, operators)]
        header, rows = time_table(cases)
    lines = map(row, [header, ["---", *["---:"] * (len(header) - 1)], *rows])
    return "\n".join(["", *lines, "", origin(file, measured, cases), ""])


def origin(file: Path, measured: dict[str, Any], cases: list[Result]) -> str:
    """Machine, versions, and of the cases the last date and every commit."""
    dates, commits = (sorted({case[key] for case in cases}) for key in ("date", "commit"))
    return (
        f"{measured['processor']}, PyTorch {measured['PyTorch']}, {dates[-1][:10]}, "
        f"commit {', '.join(commits)}; `bench/results/{file.relative_to(RESULTS)}`."
    )


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
    """Without the columns in which fewer than a quarter of the cases have anything."""
    columns = [column for column in COLUMNS if 4 * sum(column[1](case) != "" for case in cases) >= len(cases)]
    return [title for title, _ in columns], [[cell(case) for _, cell in columns] for case in cases]


def in_order(cases: list[Result]) -> list[Result]:
    """Those in which a fused loss ran."""

    def numbers_as_numbers(text: str) -> list[tuple[bool, str | int]]:
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]

    ran = [case for case in cases if FUSED in case.get("seconds", {})]
    return sorted(ran, key=lambda case: (OPERATORS.index(case["operator"]), numbers_as_numbers(case["case"])))


def series(case: Result) -> tuple[str, int]:
    """A loss with its settings, and the batch."""
    return case["parameters"]["loss"], case["parameters"]["batch"]


def shown(case: Result, operators: list[str]) -> bool:
    return case["operator"] in operators if operators else case["headline"]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def least(case: Result, kind: str, quantity: str = "seconds", unit: float = 1) -> float | None:
    """The least that any variant of a kind took."""
    measured = case.get(quantity, {}).items()
    return min((value / unit for name, value in measured if kind_of(name) == kind), default=None)


def kind_of(variant: str) -> str:
    if variant in (FUSED, STREAMED):
        return variant
    return COMPILED if variant.endswith(COMPILED) else EAGER


def ratio(case: Result) -> str:
    return times(case, min((seconds for name, seconds in case["seconds"].items() if name != FUSED), default=None))


def times(case: Result, seconds: float | None) -> str:
    """How many times as long as the fused loss ``seconds`` are."""
    return "" if seconds is None else f"{seconds / case['seconds'][FUSED]:.2f}x"


def memory(case: Result) -> str:
    own, eager = (least(case, kind, "peak extra bytes") for kind in (FUSED, EAGER))
    if own is None:
        return ""
    return f"{mebibytes(own)} / {mebibytes(eager)} MiB" if eager is not None else f"{mebibytes(own)} MiB"


def share(case: Result) -> str:
    return f"{case['share of the limit']:.0%}" if "share of the limit" in case else ""


COLUMNS = (
    ("forward + backward", lambda case: case["case"]),
    ("fused", lambda case: f"**{duration(least(case, FUSED))}**"),
    ("best eager", lambda case: duration(least(case, EAGER))),
    ("best compiled", lambda case: duration(least(case, COMPILED))),
    ("KeOps", lambda case: duration(least(case, STREAMED))),
    ("ratio to the best", ratio),
    ("ratio to a loop over rows", lambda case: times(case, case["seconds"].get(LOOP))),
    ("peak memory beside the gradients, fused / eager", memory),
    ("of the machine's limit", share),
)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def curves(file: Path) -> dict[str, list[Result]]:
    """What was measured at several batches, by loss, in order of operators and batches."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for case in in_order(results.read(file).get("results", [])):
        groups[series(case)[0]].append(case)
    return {loss: group for loss, group in groups.items() if len(group) >= 2}


def overview(groups: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """One loss of each of a few operators: that with the most batches, and among those the largest."""
    chosen = {}
    for operator in OVERVIEW:
        own = [loss for loss, group in groups.items() if group[0]["operator"] == operator]
        if own:
            loss = max(own, key=lambda name: (len(groups[name]), own.index(name)))
            chosen[loss] = groups[loss]
    return chosen


def plot(groups: dict[str, list[Result]], target: Path, *, across: int) -> None:
    """Time, memory and share of the limit against the batch, a column for each loss, so many beside one another."""
    import matplotlib.pyplot as plt

    bands = -(-len(groups) // across)
    size = 3 * across, 6.4 * bands
    figure, axes = plt.subplots(3 * bands, across, figsize=size, squeeze=False, layout="constrained")
    columns = [axes[3 * band : 3 * band + 3, i] for band in range(bands) for i in range(across)]
    for axis in axes.flat:
        axis.axis("off")
    for i, (column, (loss, group)) in enumerate(zip(columns, groups.items(), strict=False)):
        draw(column, loss, group, labels=i % across == 0)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    figure.savefig(target, dpi=100)
    plt.close(figure)


def draw(column, loss: str, group: list[Result], *, labels: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    batches = [series(case)[1] for case in group]
    panels = (
        ("ms", [{kind: least(case, kind, "seconds", 1e-3) for kind in KINDS} for case in group]),
        (
            "MiB at the peak",
            [{kind: least(case, kind, "peak extra bytes", 2**20) for kind in KINDS} for case in group],
        ),
        ("share of the limit", [{FUSED: case.get("share of the limit")} for case in group]),
    )
    for axis, (label, values) in zip(column, panels, strict=True):
        for kind, (name, color) in KINDS.items():
            points = [(x, y[kind]) for x, y in zip(batches, values, strict=True) if y.get(kind) is not None]
            if points:
                style = {"color": color, "lw": 2.5 if kind == FUSED else 1.2, "ms": 4}
                axis.plot(*zip(*points, strict=True), "o-", label=name, **style)
        if not axis.lines:
            continue
        axis.axis("on")
        axis.set_xscale("log")
        axis.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
        axis.set_xticks(batches, batches)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        if label == "share of the limit":
            axis.set_ylim(0, max(1, 1.05 * axis.get_ylim()[1]))
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        if labels:
            axis.set_ylabel(label)
    column[0].set_title(loss, fontsize=9)
    [axis for axis in column if axis.lines][-1].set_xlabel("batch")


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
        groups = curves(file)
        for name, chosen in (("overview", overview(groups)), ("all", groups)):
            if chosen:
                target = file.with_name(f"{file.stem}-{name}.png")
                plot(chosen, target, across=min(4, len(chosen)))
                print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
