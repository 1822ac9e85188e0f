"""Accuracies over seeds as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(teacher: tuple[str, float], methods: Mapping[str, Sequence[float]], baseline: str) -> str:
    """A Markdown table: every method's accuracy over the seeds, and its gain over ``baseline``, seed by seed."""
    seeds = max(len(values) for values in methods.values())
    compared = baseline in methods
    header = ["method", f"test accuracy, % ({seeds} seed{'s' if seeds > 1 else ''})"]
    rows = [[f"teacher ({teacher[0]})", f"{teacher[1]:.2f}"]]
    for name, values in methods.items():
        rows.append([name, spread(values)])
    if compared:
        header.append(f"gain over {baseline}, seed by seed")
        rows[0].append("")
        for row, values in zip(rows[1:], methods.values(), strict=True):
            gains = [value - base for value, base in zip(values, methods[baseline], strict=True)]
            row.append("" if row[0] == baseline else spread(gains))
    return markdown(header, rows)


def grid(corner: str, rows: Mapping[str, Sequence[Sequence[float]]], columns: Sequence[str]) -> str:
    """A Markdown table: each cell is the mean and the deviation of its values."""
    return markdown([corner, *columns], [[name, *map(spread, cells)] for name, cells in rows.items()])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are as wide as their longest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
