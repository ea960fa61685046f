"""The pictures of a comparison: AUC against parameters kept, and against the number of training images."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter, NullLocator

from chanscale.comparison.table import Row, find, sort_sizes

_COLOURS = ("#c44e52", "#3b76af", "#e1812c", "#3a923a", "#845b97", "#7f7f7f", "#b8a11d", "#2aa3a3", "#d684bd")


def draw_accuracy_size(rows: Sequence[Row]) -> Figure:
    """Draw the test AUC of each method against the parameters it keeps, on the most training images there are.

    A small point is a cell, the large one their mean with its 95 % interval.
    """
    most = sort_sizes(row.size for row in rows)[-1]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="parameters kept in the trunk", ylabel="test AUC")
    colours = _choose_colours(rows)
    for row in rows:
        if row.size == most:
            kept = [find(result, "parameters", "kept") for result in row.results]
            aucs = [find(result, "auc") for result in row.results]
            axes.scatter(kept, aucs, color=colours[row.method], alpha=0.35, s=14, linewidths=0)
            _mark(axes, [row.mean("parameters", "kept")], [row], colours[row.method], line=False)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("all training images" if most is None else f"{most} training images", fontsize="medium")
    return _finish(figure, axes)


def draw_small_data(rows: Sequence[Row]) -> Figure:
    """Draw the test AUC of each method against the number of its training images, with 95 % intervals."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="training images", ylabel="test AUC")
    for method, colour in _choose_colours(rows).items():
        own = [row for row in rows if row.method == method]
        _mark(axes, [row.mean("images", "train") for row in own], own, colour, line=True)
    places = sorted({round(row.mean("images", "train")) for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    return _finish(figure, axes)


def _mark(axes: Axes, places: Sequence[float], rows: Sequence[Row], colour: str, *, line: bool) -> None:
    means = [row.auc.value for row in rows]
    arms = [
        [0 if math.isnan(row.auc.low) else row.auc.value - row.auc.low for row in rows],
        [0 if math.isnan(row.auc.high) else row.auc.high - row.auc.value for row in rows],
    ]
    axes.errorbar(
        places, means, arms, color=colour, marker="o", markersize=7, capsize=3, linewidth=1.2,
        linestyle="-" if line else "none", label=rows[0].method, zorder=3,
    )  # fmt: skip


def _choose_colours(rows: Sequence[Row]) -> dict[str, str]:
    methods = dict.fromkeys(row.method for row in rows)
    return {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(methods)}


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small", loc="best")
    return figure
