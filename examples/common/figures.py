"""Draw the figures of the examples and of the documentation, in the style of ``kdkernels.mplstyle``.

The figures are drawn without pyplot, so nothing is shown and no state is shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, style
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

LIGHT, DARK = (str(Path(__file__).with_name(f"{name}.mplstyle")) for name in ("kdkernels", "dark"))
COLOURS = tuple(f"C{i}" for i in range(8))  # of the style sheet
TEACHER = "#333333"
MASK_COLOURS = colormaps["RdYlBu_r"]

style.use(LIGHT)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date, a figure that did not change gives the same bytes.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".svg":  # matplotlib begins a line at every point of a path
        path.write_text(re.sub(r"\s*\n\s*(?!\s*<)", " ", path.read_text()))
    return path


def save_variants(draw: Callable[[], Figure], path: Path) -> None:
    """Save ``x.svg`` for light pages and ``x-dark.svg`` for dark pages."""
    for styles, file in (([LIGHT], path), ([LIGHT, DARK], path.with_stem(f"{path.stem}-dark"))):
        with style.context(styles):
            save(draw(), file)


def curves(
    path: Path,
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    panels: Sequence[tuple[str, str]],
    *,
    log: Sequence[str] = (),
    zoom: Sequence[str] = (),
    level: tuple[str, str, float] | None = None,
) -> Path:
    """Draw one panel per ``(key, title)`` against the epoch: each method's mean over its runs, shaded from low to high.

    Args:
        runs: the histories of the runs, by method.
        log: keys with a logarithmic axis.
        zoom: keys whose axis shows only the values of the second half of training.
        level: key, label and height of a horizontal line.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.7))
    for axes, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for (name, histories), colour in zip(runs.items(), COLOURS, strict=False):
            if key not in histories[0][0]:
                continue
            epochs = [record["epoch"] for record in histories[0]]
            values = np.array([[record[key] for record in history] for history in histories])
            axes.plot(epochs, values.mean(0), color=colour, label=name)
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        if level is not None and level[0] == key:
            axes.axhline(level[2], color=TEACHER, linestyle="--", linewidth=1.2, label=level[1])
        if key in zoom:
            late = [record[key] for run in runs.values() for history in run for record in history[len(history) // 2 :]]
            high = max([*late, *([level[2]] if level is not None and level[0] == key else [])])
            margin = 0.1 * (high - min(late)) or 1
            axes.set_ylim(min(late) - margin, high + margin)
        if key in log:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        _tidy(axes, title, "epoch")
        axes.legend()
    return save(figure, path)


def histograms(path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], edges: np.ndarray, label: str) -> Path:
    """Draw one panel per stage: every network's density over the same bins. The first, the teacher's, is filled."""
    figure = Figure(figsize=(4.6 * len(panels), 3.7))
    for axes, (title, densities) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for index, (name, density) in enumerate(densities.items()):
            if index == 0:
                axes.stairs(density, edges, fill=True, color=TEACHER, alpha=0.25, label=name)
            else:
                axes.stairs(density, edges, color=COLOURS[index - 1], linewidth=1.6, label=name)
        used = np.flatnonzero(sum(densities.values()))
        axes.set_xlim(edges[used[0]], edges[used[-1] + 1])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _tidy(axes, title, label)
        axes.legend()
    return save(figure, path)


def attention(path: Path, weights: Mapping[str, np.ndarray]) -> Path:
    """Draw a row per method and a panel per student layer: its attention to each teacher layer against the epoch. Lines
    are means over the runs, shaded from low to high.

    Args:
        weights: runs x epochs x student layers x teacher layers, by method.
    """
    layers = next(iter(weights.values())).shape[2]
    figure = Figure(figsize=(3.1 * layers, 2.7 * len(weights)))
    grid = figure.subplots(len(weights), layers, squeeze=False, sharex=True, sharey="row")
    for row, (name, values) in zip(grid, weights.items(), strict=True):
        epochs = np.arange(1, values.shape[1] + 1)
        for layer, axes in enumerate(row):
            for target, colour in zip(range(values.shape[3]), COLOURS, strict=False):
                line = values[:, :, layer, target]
                axes.plot(epochs, line.mean(0), color=colour, label=f"teacher layer {target + 1}")
                axes.fill_between(epochs, line.min(0), line.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.axhline(1 / values.shape[3], color=TEACHER, linestyle=":", linewidth=1)
            _tidy(axes, f"{name}, student layer {layer + 1}", "epoch")
        row[0].set_ylabel("attention")
    grid[0, 0].legend()
    return save(figure, path)


def against(
    path: Path,
    x: Sequence[float],
    lines: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    title: str,
    *,
    level: tuple[str, float] | None = None,
) -> Path:
    """Draw each line's mean over its runs against ``x``, with bars from low to high.

    Args:
        lines: the values of the runs, for every line and every ``x``.
        level: label and height of a horizontal line.
    """
    figure = Figure(figsize=(4.6, 3.7))
    axes = figure.subplots()
    for (name, runs), colour in zip(lines.items(), COLOURS, strict=False):
        means = [np.mean(values) for values in runs]
        reach = [[m - min(v), max(v) - m] for m, v in zip(means, runs, strict=True)]
        axes.errorbar(x, means, np.transpose(reach), color=colour, marker="o", capsize=3, label=name)
    if level is not None:
        axes.axhline(level[1], color=TEACHER, linestyle="--", linewidth=1.2, label=level[0])
    _tidy(axes, title, xlabel)
    axes.legend()
    return save(figure, path)


def masks(
    path: Path,
    images: np.ndarray,
    names: Sequence[str],
    stages: Sequence[tuple[np.ndarray, np.ndarray]],
    threshold: float,
) -> Path:
    """Draw a column per image: the image, then per stage the feature map, and the mask with its box over the image.

    Args:
        images: n x h x w x channels in [0, 1].
        stages: n x h x w feature maps (any scale) and masks in [0, 1], per stage.
        threshold: the box bounds the values above it.
    """
    labels = ["image"]
    for number in range(1, len(stages) + 1):
        labels += [f"stage {number}\nfeatures", f"stage {number}\nmask"]
    figure = Figure(figsize=(1.05 * len(images) + 1.3, 1.05 * len(labels) + 0.4))
    grid = figure.subplots(len(labels), len(images), squeeze=False)
    height, width = images.shape[1:3]
    extent = (0, width, height, 0)
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        grid[0, column].set_title(name)
        grid[0, column].imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, extent=extent)
        for number, (features, mask) in enumerate(stages):
            grid[1 + 2 * number, column].imshow(features[column], extent=extent)
            axes = grid[2 + 2 * number, column]
            axes.imshow(_tint(image, mask[column]), extent=extent)
            top, bottom, left, right = _box(mask[column] > threshold)
            scale_y, scale_x = height / mask.shape[1], width / mask.shape[2]
            corner, size = (left * scale_x, top * scale_y), ((right - left) * scale_x, (bottom - top) * scale_y)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.4, clip_on=False))
    for row, label in zip(grid, labels, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    colours = ScalarMappable(Normalize(0, 1), MASK_COLOURS)
    bar = figure.colorbar(colours, ax=grid[2::2].ravel().tolist(), shrink=0.5, aspect=30)
    bar.set_label("mask")
    return save(figure, path)


def heatmaps(path: Path, images: np.ndarray, names: Sequence[str], rows: Mapping[str, np.ndarray]) -> Path:
    """Draw a column per image and a row per network: its heat map over the image. Red is high.

    Args:
        images: n x h x w x channels in [0, 1].
        names: of the columns.
        rows: n x h' x w' maps in [0, 1], by network.
    """
    figure = Figure(figsize=(1.05 * len(images) + 1.6, 1.05 * (len(rows) + 1) + 0.4))
    grid = figure.subplots(len(rows) + 1, len(images), squeeze=False)
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        grid[0, column].set_title(name)
        grid[0, column].imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
        for row, maps in enumerate(rows.values(), 1):
            grid[row, column].imshow(_tint(image, maps[column]))
    for row, label in zip(grid, ["image", *rows], strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return save(figure, path)


def bars(
    path: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    title: str,
    levels: Mapping[str, float],
) -> Path:
    """Draw bars in groups: the mean of each cell over its runs, with lines from low to high.

    Args:
        series: the values of the runs, for every series and every group.
        levels: heights of horizontal lines, by label.
    """
    figure = Figure(figsize=(max(4.6, 0.35 * len(groups) * (len(series) + 1) + 1.5), 3.7))
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, ((name, cells), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        means = np.array([np.mean(values) for values in cells])
        reach = [means - [min(values) for values in cells], [max(values) for values in cells] - means]
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        axes.bar(places, means, 0.9 * width, yerr=reach, capsize=2, color=colour, label=name)
    for (name, height), colour in zip(levels.items(), (TEACHER, *COLOURS[::-1]), strict=False):
        axes.axhline(height, color=colour, linestyle="--", linewidth=1.2, label=name)
    everything = [value for cells in series.values() for values in cells for value in values] + [*levels.values()]
    margin = 0.15 * (max(everything) - min(everything)) or 1
    axes.set_ylim(min(everything) - margin, max(everything) + margin)
    axes.set_xticks(np.arange(len(groups)), groups)
    _tidy(axes, title, xlabel)
    axes.legend()
    return save(figure, path)


def points(path: Path, values: Mapping[str, Sequence[float]], title: str) -> Path:
    """Draw the values of each name as points, with a line at their mean."""
    figure = Figure(figsize=(max(4.6, 0.9 * len(values) + 1), 3.7))
    axes = figure.subplots()
    for place, (numbers, colour) in enumerate(zip(values.values(), COLOURS * 2, strict=False)):
        axes.scatter([place] * len(numbers), numbers, color=colour, alpha=0.7)
        axes.hlines(np.mean(numbers), place - 0.3, place + 0.3, color=colour)
    axes.axhline(0, color=TEACHER, linestyle=":", linewidth=1)
    axes.set_xticks(np.arange(len(values)), list(values))
    _tidy(axes, title, "")
    return save(figure, path)


def matrices(path: Path, panels: Mapping[str, np.ndarray], names: Sequence[str], label: str) -> Path:
    """Draw square matrices over the classes, or over equally many images per class, side by side on one scale. The
    classes are named if there are few.
    """
    figure = Figure(figsize=(3.2 * len(panels) + 0.8, 3.4))
    row = np.atleast_1d(figure.subplots(1, len(panels)))
    low, high = min(map(np.min, panels.values())), max(map(np.max, panels.values()))
    for axes, (title, matrix) in zip(row, panels.items(), strict=True):
        image = axes.imshow(matrix, vmin=low, vmax=high)
        axes.set_title(title)
        named = names if len(names) <= 20 else []
        ticks = (np.arange(len(named)) + 0.5) * len(matrix) / len(names) - 0.5
        axes.set_xticks(ticks, named, fontsize="x-small")
        axes.set_yticks(ticks, named, fontsize="x-small")
    figure.colorbar(image, ax=row.tolist(), shrink=0.8).set_label(label)
    return save(figure, path)


def embeddings(path: Path, panels: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str]) -> Path:
    """Draw points in the plane, coloured by class, a panel per network. The classes are named at their points if there
    are few.
    """
    figure = Figure(figsize=(3.2 * len(panels), 3.4))
    few = len(names) <= 10
    colours = colormaps["tab10"](np.arange(10)) if few else colormaps["turbo"](np.linspace(0, 1, len(names)))
    for axes, (title, points) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.scatter(*points.T, c=colours[labels], s=6, linewidths=0)
        if len(names) <= 20:
            for label, name in enumerate(names):
                axes.annotate(name, np.median(points[labels == label], axis=0), fontsize=10, weight="bold")
        axes.set_title(title)
        axes.set(xticks=[], yticks=[])
    return save(figure, path)


def _tint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mask's colours, with the brightness of the image."""
    (height, width), (rows, columns) = image.shape[:2], mask.shape
    over_image = mask[np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width]
    return MASK_COLOURS(over_image)[..., :3] * (0.5 + 0.5 * image.mean(-1, keepdims=True))


def _box(inside: np.ndarray) -> tuple[int, int, int, int]:
    if not inside.any():
        return 0, inside.shape[0], 0, inside.shape[1]
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _tidy(axes, title: str, xlabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
