"""Accuracies over seeds as tables: numbers in results.json, Markdown on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

GAIN = "gain over"  # a column of paired differences starts with it
Table = dict[str, Any]  # with "header", "rows", "title" and "median"; a cell is a text, or values over seeds


def spread(values: Sequence[float], *, median: bool = False) -> str:
    """Return mean ± sample standard deviation, or the median with the lowest and the highest value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    if median:
        return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


class Comparison(NamedTuple):
    """A mean paired difference, the ends of the 95 % interval of this mean, and the p value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Apply Student's t to the differences, pair by pair. It needs two or more pairs."""
    differences = np.subtract(values, baseline)
    if not differences.std():  # t would be 0/0 or infinite
        same = float(differences[0])
        return Comparison(same, same, same, 0.0 if same else 1.0)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Comparison(float(differences.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def table(
    teacher: tuple[str, float],
    methods: Mapping[str, Sequence[float]],
    baseline: str,
    title: str = "",
    *,
    median: bool = False,
) -> Table:
    """Return every method's accuracy over the seeds, and its gain over ``baseline``, seed by seed."""
    seeds = max(len(values) for values in methods.values())
    compared = baseline in methods
    header = ["method", f"test accuracy, % ({seeds} seed{'s' if seeds > 1 else ''})"]
    rows = [[f"teacher ({teacher[0]})", [teacher[1]]]]
    for name, values in methods.items():
        rows.append([name, values])
    if compared:
        header.append(f"{GAIN} {baseline}, seed by seed")
        rows[0].append("")
        for row, values in zip(rows[1:], methods.values(), strict=True):
            gains = [value - base for value, base in zip(values, methods[baseline], strict=True)]
            row.append("" if row[0] == baseline else gains)
    return {"title": title, "header": header, "rows": rows, "median": median}


def grid(
    corner: str,
    rows: Mapping[str, Sequence[Sequence[float]]],
    columns: Sequence[str],
    title: str = "",
    *,
    median: bool = False,
) -> Table:
    """Return a table whose cells are values over the seeds."""
    cells = [[name, *values] for name, values in rows.items()]
    return {"title": title, "header": [corner, *columns], "rows": cells, "median": median}


def report(tables: Sequence[Table]) -> str:
    """Return all tables of an experiment, below their titles. Gains over several seeds have their 95 % interval."""
    shown = []
    for part in tables:
        header = [f"{name} [95 % interval]" if name.startswith(GAIN) else name for name in part["header"]]
        median = part.get("median", False)
        rows = [
            [_cell(name, cell, median) for name, cell in zip(part["header"], row, strict=True)] for row in part["rows"]
        ]
        shown += [part["title"]] if part["title"] else []
        shown.append(markdown(header, rows))
    return "\n\n".join(shown)


def _cell(column: str, cell: str | Sequence[float], median: bool) -> str:
    if isinstance(cell, str):
        return cell
    if column.startswith(GAIN) and len(cell) > 1:
        return str(compare(cell, [0.0] * len(cell)))
    return spread(cell, median=median)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are as wide as their longest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
