"""Accuracies over seeds as tables: kept as numbers in results.json, shown as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Table = dict[str, Any]  # its "header" and its "rows"; a cell is a text, or values over seeds; "title" stands above


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(teacher: tuple[str, float], methods: Mapping[str, Sequence[float]], baseline: str, title: str = "") -> Table:
    """Every method's accuracy over the seeds, and its gain over ``baseline``, seed by seed."""
    seeds = max(len(values) for values in methods.values())
    compared = baseline in methods
    header = ["method", f"test accuracy, % ({seeds} seed{'s' if seeds > 1 else ''})"]
    rows = [[f"teacher ({teacher[0]})", [teacher[1]]]]
    for name, values in methods.items():
        rows.append([name, values])
    if compared:
        header.append(f"gain over {baseline}, seed by seed")
        rows[0].append("")
        for row, values in zip(rows[1:], methods.values(), strict=True):
            gains = [value - base for value, base in zip(values, methods[baseline], strict=True)]
            row.append("" if row[0] == baseline else gains)
    return {"title": title, "header": header, "rows": rows}


def grid(corner: str, rows: Mapping[str, Sequence[Sequence[float]]], columns: Sequence[str], title: str = "") -> Table:
    """Each cell is the values over the seeds."""
    return {"title": title, "header": [corner, *columns], "rows": [[name, *cells] for name, cells in rows.items()]}


def report(tables: Sequence[Table]) -> str:
    """All of an experiment's tables, under their titles."""
    shown = []
    for part in tables:
        rows = [[cell if isinstance(cell, str) else spread(cell) for cell in row] for row in part["rows"]]
        shown += [part["title"]] if part["title"] else []
        shown.append(markdown(part["header"], rows))
    return "\n\n".join(shown)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are as wide as their longest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
