"""Writes the tables and figures of the documentation from bench/results: ``python bench/report.py``.

A pair of comments marks a place in a page. Everything between the two comments is replaced::

    <!-- results: cpu.json congruence patches -->
    <!-- end -->

``results`` shows a table of a file. The name may have an asterisk, and then stands for several files. Operators after
the name select every case of these operators. Without operators the table has the headline cases of all operators.
A file that holds tables, such as the files of the examples, is shown whole.

``<!-- best: cpu.json congruence -->`` shows a sentence with the largest ratio among an operator's headline cases.
``<!-- operators: all -->`` shows the table of the registry.
``<!-- predictions: FILE -->`` shows predicted times. They are of machines that no other file has measured.
``<!-- machines: cpu*.json; CASE; CASE -->`` shows a table with a row per file and a column per case.

An image ``figures/METHOD-FILE.svg`` is drawn from ``bench/results/FILE.json``, in a light and in a dark variant.

``--check`` changes nothing. It fails if the text of a page is not what it would be.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import kdkernels  # noqa: F401  # its rooms describe their operators
from kdkernels.ops import operator as registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import results  # noqa: E402
from common import figures  # noqa: E402
from common.results import report  # noqa: E402
from results import Result  # noqa: E402

RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
PLACE = re.compile(
    r"(<!-- (?P<kind>results|best|machines|operators|predictions): (?P<what>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL
)
FIGURE = re.compile(r"figures/(?P<method>[a-z]+)-(?P<file>[\w-]+)\.svg")
OPERATORS = ("congruence", "patches", "correlation_congruence", "icc", "gram", "feature_mse", "convolution", "semckd")
OPERATORS += ("similarity_preserving", "rkd", "kd", "dkd", "dist", "token_relation")
METHODS = {  # the operators whose curves a figure shows; "overview" shows one curve of each
    "overview": ("congruence", "correlation_congruence", "icc", "rkd"),
    "lkd": ("congruence",),
    "cckd": ("correlation_congruence",),
    "icct": ("icc",),
    "semckd": ("gram", "feature_mse"),
    "companions": ("kd", "rkd", "similarity_preserving"),
}
FUSED, EAGER, COMPILED, STREAMED = "fused", "eager", ", compiled", "KeOps"
LOOP = "row by row"  # how public distillation code computes CCKD
KINDS = {  # of variants: the name and the marker in figures; the style sheet has the colours in this order
    FUSED: ("fused", "o"),
    EAGER: ("best eager", "s"),
    COMPILED: ("best compiled", "^"),
    STREAMED: ("KeOps", "D"),
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str) -> str:
    """Return the page with every marked place written anew from the measurements."""
    writers = {"results": sections, "best": best, "machines": machines, "operators": operators}
    writers["predictions"] = predictions
    return PLACE.sub(lambda place: place[1] + writers[place["kind"]](place["what"]) + place[4], page)


def sections(what: str) -> str:
    name, *operators = what.split()
    return "".join(section(file, operators) for file in files(name)) or "\nNot yet measured.\n\n"


def operators(_: str) -> str:
    """Return the table of the registry: kernels, memory and traffic of every operator."""
    head = ["operator", "kernels", "runs on", "`auto` on a GPU", "memory", "exchanged by the ranks"]
    lines = [row(head), row(["---"] * len(head))]
    for name, operator in registry.OPERATORS.items():
        places = [{"cpu": "C++", "cuda": "CUDA"}[device] for device in operator.native] + ["Triton"] * operator.triton
        places += ["library"] * (operator.large is not None)
        kernels = ", ".join(f"`{kernel.name}`" for kernel in operator.kernels)
        traffic = operator.over_ranks or "no group"
        lines.append(row([f"`{name}`", kernels, ", ".join(places), operator.on_gpu, operator.memory, traffic]))
    return "\n" + "\n".join(lines) + "\n\n"


def predictions(name: str) -> str:
    """Return the table of predicted times. A machine that a file of results names is left out."""
    predicted = results.read(RESULTS / name)
    measured = [results.read(file).get("processor", "") for file in RESULTS.glob("nvidia-*.json")]
    head = ["predicted, not measured", "machine", "`auto` takes", "time", "share of the limit"]
    lines = [row(head), row(["---", "---", "---", "---:", "---:"])]
    for case in predicted["results"]:
        if not any(processor.startswith(case["machine"]) for processor in measured):
            time, share = f"{1e6 * case['seconds']:.0f} µs", f"{case['share of the limit']:.0%}"
            lines.append(row([case["case"], case["machine"], case["backend"], time, share]))
    return "\n" + "\n".join(lines) + "\n\n" if len(lines) > 2 else "\nAll machines are measured.\n\n"


def files(name: str) -> list[Path]:
    return sorted(RESULTS.glob(name)) if "*" in name else [RESULTS / name]


def best(what: str) -> str:
    """Return the sentence about the headline case with the largest ratio."""
    name, *operators = what.split()
    measured = results.read(RESULTS / name)
    cases = [case for case in in_order(measured["results"]) if case["operator"] in operators and case["headline"]]
    case = max(cases, key=lambda case: min(others(case)) / case["seconds"][FUSED])
    peaks = [mebibytes(least(case, kind, "peak extra bytes")) for kind in (FUSED, EAGER)]
    return (
        f"**{min(others(case)) / case['seconds'][FUSED]:.0f} times faster than the fastest PyTorch version, "
        f"torch.compile included**: {case['case']}, forward and backward, takes {duration(least(case, FUSED))} "
        f"in place of {duration(min(others(case)))}, and {peaks[0]} MiB of extra memory in place of {peaks[1]} MiB "
        f"({measured['processor']}, {case['date'][:10]}).\n"
    )


def machines(what: str) -> str:
    """Return a table of ratios: a row per machine, a column per case."""
    name, *wanted = (part.strip() for part in what.split(";"))
    rows = []
    for file in files(name):
        measured = results.read(file)
        cases = {case["case"]: case for case in in_order(measured["results"])}
        rows.append([measured["processor"], *(ratio(cases[case]) if case in cases else "" for case in wanted)])
    header = ["machine", *wanted]
    return "\n".join(["", *map(row, [header, ["---", *["---:"] * len(wanted)], *rows]), ""])


def section(file: Path, operators: list[str]) -> str:
    """Return the tables of a file of results and their provenance."""
    measured = results.read(file)
    if "tables" in measured:
        return f"\n{report(measured['tables'])}\n\n{origin(file, measured, [measured])}\n"
    if "runs" in measured:  # a study that has not finished
        return f"\nUnder way: {len(measured['runs'])} runs are done; `bench/results/{file.relative_to(RESULTS)}`.\n\n"
    if any("errors" in case for case in measured["results"]):
        cases, (header, rows) = [measured], error_table(measured["results"])
    else:
        cases = [case for case in in_order(measured["results"]) if shown(case, operators)]
        header, rows = time_table(cases)
    lines = map(row, [header, ["---", *["---:"] * (len(header) - 1)], *rows])
    return "\n".join(["", *lines, "", origin(file, measured, cases), ""])


def origin(file: Path, measured: dict[str, Any], cases: list[Result]) -> str:
    """Return machine, versions, the last date and all commits."""
    dates, commits = (sorted({case[key] for case in cases}) for key in ("date", "commit"))
    return (
        f"{measured['processor']}, PyTorch {measured['PyTorch']}, {dates[-1][:10]}, "
        f"commit {', '.join(commits)}; `bench/results/{file.relative_to(RESULTS)}`."
    )


def error_table(cases: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table of bench/precision.py: errors of loss and gradient by kind of input."""
    kinds = list(cases[0]["errors"])
    rows = [
        [case["case"], *(f"{case['errors'][kind][what]:.0e}" for kind in kinds for what in ("loss", "gradient"))]
        for case in cases
    ]
    rounding = [f"{max(case['errors'][kind]['rounded'] for case in cases):.0e}" for kind in kinds]
    rows.append(["the exact gradient, rounded", *(cell for value in rounding for cell in ("", value))])
    return ["", *(f"{kind}: {what}" for kind in kinds for what in ("loss", "gradient"))], rows


def time_table(cases: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table without columns that are empty in more than three quarters of the cases."""
    columns = [column for column in COLUMNS if 4 * sum(column[1](case) != "" for case in cases) >= len(cases)]
    return [title for title, _ in columns], [[cell(case) for _, cell in columns] for case in cases]


def in_order(cases: list[Result]) -> list[Result]:
    """Return the cases in which a fused loss ran, in the order of operators and sizes."""

    def numbers_as_numbers(text: str) -> list[tuple[bool, str | int]]:
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", text)]

    ran = [case for case in cases if FUSED in case.get("seconds", {})]
    return sorted(ran, key=lambda case: (OPERATORS.index(case["operator"]), numbers_as_numbers(case["case"])))


def series(case: Result) -> tuple[str, int]:
    """Return the loss with its settings, and the batch."""
    return case["parameters"]["loss"], case["parameters"]["batch"]


def shown(case: Result, operators: list[str]) -> bool:
    return case["operator"] in operators if operators else case["headline"]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def least(case: Result, kind: str, quantity: str = "seconds", unit: float = 1) -> float | None:
    """Return the smallest number of any variant of a kind."""
    measured = case.get(quantity, {}).items()
    return min((value / unit for name, value in measured if kind_of(name) == kind), default=None)


def kind_of(variant: str) -> str:
    if variant in (FUSED, STREAMED):
        return variant
    return COMPILED if variant.endswith(COMPILED) else EAGER


def ratio(case: Result) -> str:
    return ratio_of(case, min(others(case), default=None))


def others(case: Result) -> list[float]:
    """Return the seconds of every version except the fused version."""
    return [seconds for name, seconds in case["seconds"].items() if name != FUSED]


def ratio_of(case: Result, seconds: float | None) -> str:
    """Return the ratio of ``seconds`` to the time of the fused loss."""
    return "" if seconds is None else f"{seconds / case['seconds'][FUSED]:.2f}x"


def memory(case: Result) -> str:
    own, eager = (least(case, kind, "peak extra bytes") for kind in (FUSED, EAGER))
    if own is None:
        return ""
    return f"{mebibytes(own)} / {mebibytes(eager)} MiB" if eager is not None else f"{mebibytes(own)} MiB"


def share(case: Result, of: str) -> str:
    return f"{case[of]:.0%}" if of in case else ""


COLUMNS = (
    ("forward + backward", lambda case: case["case"]),
    ("fused", lambda case: f"**{duration(least(case, FUSED))}**"),
    ("best eager", lambda case: duration(least(case, EAGER))),
    ("best compiled", lambda case: duration(least(case, COMPILED))),
    ("KeOps", lambda case: duration(least(case, STREAMED))),
    ("ratio to the best", ratio),
    ("ratio to a loop over rows", lambda case: ratio_of(case, case["seconds"].get(LOOP))),
    ("peak memory beside the gradients, fused / eager", memory),
    ("of the processor's peak", lambda case: share(case, "share of the peak")),
    ("of the machine's limit", lambda case: share(case, "share of the limit")),  # the rate of torch.mm, in older files
)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def curves(file: Path) -> dict[str, list[Result]]:
    """Return the cases with several batch sizes by loss, in the order of operators and batches."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for case in in_order(results.read(file).get("results", [])):
        groups[series(case)[0]].append(case)
    return {loss: group for loss, group in groups.items() if len(group) >= 2}


def drawn(method: str, groups: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """Return the curves of a method's figure. The overview has one loss per operator, the one with the most batches."""
    chosen = {}
    for operator in METHODS[method]:
        own = [loss for loss, group in groups.items() if group[0]["operator"] == operator]
        if own and method == "overview":
            own = [max(own, key=lambda name: (len(groups[name]), own.index(name)))]
        chosen |= {loss: groups[loss] for loss in own}
    return chosen


def plot(groups: dict[str, list[Result]], target: Path) -> None:
    """Draw time and memory against the batch, a column per loss. ``x.svg`` gets a dark variant ``x-dark.svg``."""
    across = 4 if len(groups) % 4 == 0 else min(len(groups), 3)
    figures.save_variants(lambda: columns(groups, across=across), target)


def columns(groups: dict[str, list[Result]], *, across: int) -> Figure:
    bands = -(-len(groups) // across)
    figure = Figure(figsize=(3.1 * across, 4.9 * bands))
    axes = figure.subplots(2 * bands, across, squeeze=False)
    pairs = [axes[2 * band : 2 * band + 2, i] for band in range(bands) for i in range(across)]
    for axis in axes.flat:
        axis.axis("off")
    for i, (pair, (loss, group)) in enumerate(zip(pairs, groups.items(), strict=False)):
        draw(pair, loss, group, labels=i % across == 0)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    return figure


def draw(pair: Sequence[Axes], loss: str, group: list[Result], *, labels: bool) -> None:
    batches = [series(case)[1] for case in group]
    panels = (("time, ms", "seconds", 1e-3), ("extra memory, MiB", "peak extra bytes", 2**20))
    for axis, (label, quantity, unit) in zip(pair, panels, strict=True):
        for color, (kind, (name, marker)) in enumerate(KINDS.items()):
            values = [least(case, kind, quantity, unit) for case in group]
            points = [(x, y) for x, y in zip(batches, values, strict=True) if y is not None]
            if points:
                width = 2.6 if kind == FUSED else 1.4
                axis.plot(*zip(*points, strict=True), marker=marker, label=name, color=f"C{color}", linewidth=width)
        if not axis.lines:
            continue
        axis.axis("on")
        axis.set_xscale("log")
        axis.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
        axis.set_xticks(batches, batches)
        axis.set_xticks([], minor=True)
        axis.grid(visible=True)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 30 * low else (1, 2, 3, 5), numticks=6))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        if labels:
            axis.set_ylabel(label)
    pair[0].set_title(textwrap.fill(loss, 24))
    [axis for axis in pair if axis.lines][-1].set_xlabel("batch")


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
    shown = {match.groups() for page in pages() for match in FIGURE.finditer(page.read_text())}
    for method, file in sorted(shown):
        target = FIGURES / f"{method}-{file}.svg"
        if method in METHODS:
            plot(drawn(method, curves(RESULTS / f"{file}.json")), target)
        else:
            convergence = importlib.import_module("convergence")  # needs PyTorch
            measured = results.read(RESULTS / f"{method}-{file}.json")
            convergence.draw(target, measured["curves"], measured["steps per point"])
        print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
