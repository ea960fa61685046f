"""The pictures of a comparison: AUC against parameters kept, and against the number of training images."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter, NullLocator
from sklearn.isotonic import isotonic_regression

from chanscale.comparison.methods import plain
from chanscale.comparison.table import Row, find, sort_sizes
from chanscale.plotting import add_log_axes

_COLOURS = ("#c44e52", "#3b76af", "#e1812c", "#3a923a", "#845b97", "#7f7f7f", "#b8a11d", "#2aa3a3", "#d684bd")
_MARKERS = "osv^DPX*<>hpd8"
"""Of the first of those that have a colour, the second, and so on."""

_BESIDE = 8
"""More methods than this are told beside the axes, where they hide nothing."""

_GAP = 0.08
"""How far apart marks are to be at least, as a share of their place, not to lie on one another."""

Look = tuple[str, str]
"""A colour and a marker."""


def draw_accuracy_size(rows: Sequence[Row]) -> Figure:
    """Draw the test AUC of each method against the parameters it keeps, on the most training images there are.

    A small point is a cell, the large one their mean with its 95 % interval. A line joins a method at its budgets.
    Methods that keep as many stand side by side, around the place where all of them belong, and the axis says so.
    """
    most = sort_sizes(row.size for row in rows)[-1]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    looks = _choose_looks(rows)
    shown = [row for row in rows if row.size == most]
    places = {row.method: row.mean("parameters", "kept") for row in shown}
    apart = _stand_apart(places)
    kept = {
        row.method: [find(result, "parameters", "kept") * apart[row.method] for result in row.results]
        for row in shown
    }
    axes = add_log_axes(
        figure, chain(*kept.values()), xlabel="parameters kept in the trunk", ylabel="test AUC"
    )
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in shown:
        colour, marker = looks[row.method]
        aucs = [find(result, "auc") for result in row.results]
        axes.scatter(kept[row.method], aucs, color=colour, marker=marker, alpha=0.35, s=14, linewidths=0)
        place = places[row.method] * apart[row.method]
        _mark(axes, [place], [row], looks[row.method], line=False)
        if "+" not in row.method:
            lines.setdefault((plain(row.method), colour), []).append((place, row.auc.value))
    for (_, colour), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=1)
    if not np.allclose([*apart.values()], 1):
        axes.set_xlabel(f"{axes.get_xlabel()}\n(marks that would overlap: side by side)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("all training images" if most is None else f"{most} training images", fontsize="medium")
    return _finish(figure, axes)


def draw_small_data(rows: Sequence[Row]) -> Figure:
    """Draw the test AUC of each method against the number of its training images, with 95 % intervals.

    Methods that were run on one number alone are left out, unless all were.
    """
    looks = _choose_looks(rows)  # of all, so that they are those of the other picture
    sizes = Counter(row.method for row in rows)
    rows = [row for row in rows if sizes[row.method] > 1] or rows
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    numbers = [row.mean("images", "train") for row in rows]
    axes = add_log_axes(figure, numbers, xlabel="training images", ylabel="test AUC")
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        _mark(axes, [row.mean("images", "train") for row in own], own, looks[method], line=True)
    places = sorted({round(number) for number in numbers})
    # Methods that were run on other folds have an image more or less.
    apart = [place for before, place in pairwise([0, *places]) if place > 1.1 * before]
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    return _finish(figure, axes)


def _stand_apart(places: Mapping[str, float]) -> dict[str, float]:
    """Return what to multiply each place with, on a logarithmic axis, so that no mark lies on another.

    As little as does it, in least squares: an isotonic regression, of what is left of the places when each is to be
    one gap further than that before.
    """
    order = sorted(places, key=lambda name: places[name])
    logs = np.log([places[name] for name in order])
    gaps = np.log1p(_GAP) * np.arange(len(order))
    moved = isotonic_regression(logs - gaps) + gaps - logs
    return dict(zip(order, np.exp(moved).tolist(), strict=True))


def _mark(axes: Axes, places: Sequence[float], rows: Sequence[Row], look: Look, *, line: bool) -> None:
    means = [row.auc.value for row in rows]
    # That of two folds spans nearly everything, and would press all others flat.
    drawn = [row.folds > 2 and not math.isnan(row.auc.low) for row in rows]
    arms = [
        [row.auc.value - row.auc.low if shown else 0 for row, shown in zip(rows, drawn, strict=True)],
        [row.auc.high - row.auc.value if shown else 0 for row, shown in zip(rows, drawn, strict=True)],
    ]
    axes.errorbar(
        places, means, arms, color=look[0], marker=look[1], markersize=7, capsize=3, linewidth=1.2,
        linestyle="-" if line else "none", label=rows[0].method, zorder=3,
    )  # fmt: skip


def _choose_looks(rows: Sequence[Row]) -> dict[str, Look]:
    """Return a look for each method; one method at several budgets, or with several options, keeps its colour."""
    families: dict[str, list[str]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        families.setdefault(plain(method), []).append(method)
    looks: dict[str, Look] = {}
    taken: Counter[str] = Counter()
    for colour, family in zip(cycle(_COLOURS), families.values(), strict=False):
        for method in family:
            looks[method] = colour, _MARKERS[taken[colour] % len(_MARKERS)]
            taken[colour] += 1
    return looks


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    if (count := len(axes.get_legend_handles_labels()[1])) > _BESIDE:
        figure.set_size_inches(9.6, max(4.4, 0.4 + 0.185 * count))
        figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    else:
        axes.legend(frameon=False, fontsize="small", loc="best")
    return figure
