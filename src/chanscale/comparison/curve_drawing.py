"""The picture of a learning curve: what was measured, the law that fits it, and how far it may be off."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from chanscale.comparison.learning_curve import LearningCurve

FARTHEST = 4
"""How many times the largest size the curve is drawn to."""
_INK, _FAINT = "#c44e52", "#7f7f7f"


def draw_curve(curve: LearningCurve, *, method: str) -> Figure:
    """Draw each cell, the mean of each size, and the law with its 95 % band, to four times the largest size."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="training images", ylabel="test AUC")
    places = np.geomspace(curve.points[0].images, FARTHEST * curve.most, 100)
    low, middle, high = np.percentile([law.at(places) for law in curve.draws], [2.5, 50, 97.5], axis=0)
    axes.fill_between(places, low, high, color=_INK, alpha=0.18, linewidth=0, label="95 %")
    seen = places <= curve.most
    axes.plot(places[seen], middle[seen], color=_INK, label=method)
    axes.plot(places[~seen], middle[~seen], color=_INK, linestyle=(0, (4, 3)), label="not measured")
    for point in curve.points:
        axes.scatter(
            [point.images] * len(point.aucs), point.aucs, color=_FAINT, s=14, alpha=0.6, linewidths=0
        )
    axes.plot(
        [p.images for p in curve.points], [p.mean for p in curve.points], color=_INK, marker="o", linestyle=""
    )
    ticks = [round(p.images) for p in curve.points] + [round(t * curve.most) for t in (2, FARTHEST)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure
