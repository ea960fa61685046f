"""The picture of a search: validation AUC against what is kept."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from chanscale.plotting import add_log_axes
from chanscale.tuning.trials import COMPLETE, FAILED, STOPPED, Result

AXES = {"parameters": "parameters kept in the trunk", "macs": "MACs for an image"}


def draw_pareto(
    results: Sequence[Result], front: Sequence[Result], *, best: Result, of: str, images: int
) -> Figure:
    """Draw all trials that left a network, and the `front` with the number of each trial; `best` is filled.

    `images`: how many the AUC is of.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    costs = [result[of]["kept"] for result in results if result["state"] != FAILED]
    axes = add_log_axes(figure, costs, xlabel=AXES[of], ylabel="validation AUC")
    for state, marker, colour in ((COMPLETE, "o", "#7f7f7f"), (STOPPED, "x", "#c44e52")):
        label = "ended" if state == COMPLETE else "stopped early"
        _scatter(axes, [result for result in results if result["state"] == state], of, marker, colour, label)
    _draw_front(axes, front, of)
    axes.plot(*_place(best, of), "o", color="#3b76af", markersize=8, label="best.yaml", zorder=4)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    # A picture travels without the text around it.
    axes.set_title(f"{images} validation images, which chose: optimistic", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _scatter(axes: Axes, results: Sequence[Result], of: str, marker: str, colour: str, label: str) -> None:
    if results:
        costs, aucs = zip(*(_place(result, of) for result in results), strict=True)
        axes.scatter(costs, aucs, color=colour, marker=marker, alpha=0.6, s=22, label=label)


def _draw_front(axes: Axes, front: Sequence[Result], of: str) -> None:
    places = [_place(result, of) for result in front]
    costs, aucs = zip(*places, strict=True)
    axes.step(costs, aucs, where="post", color="#3b76af", linewidth=1.2, label="Pareto front")
    axes.plot(costs, aucs, "o", color="#3b76af", markerfacecolor="none", markersize=8, zorder=3)
    for result, place in zip(front, places, strict=True):
        axes.annotate(
            str(result["number"]), place, xytext=(6, -10), textcoords="offset points", fontsize="small"
        )


def _place(result: Result, of: str) -> tuple[float, float]:
    return result[of]["kept"], result["validation_auc"]
