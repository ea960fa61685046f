"""What a run came to: a table for the terminal, the history as a file, and two pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator
from rich import box
from rich.table import Table
from rich.text import Text

from chanscale.depth import END
from chanscale.files import write_atomically
from chanscale.plotting import to_png
from chanscale.wording import percent, printable, shorten, size_on_disk

Row = Mapping[str, Any]
Widths = Mapping[str, int]

BEFORE, AFTER = "frozen network + linear head", "chanscale"

_SCALE, _REFINE, _CHOSEN, _FAINT, _INK = "#3b76af", "#e1812c", "#b2182b", "#c9d3dc", "#333333"
_VGG16_LAYERS = {
    f"conv{block}_{conv}": width
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1)
    for conv in range(1, depth + 1)
}


def describe_run(metrics: Mapping[str, Any]) -> Table:
    """Return a table of `metrics`, as in metrics.json, that rich can print: before, after, and the change."""
    # Not markup: a label may hold brackets.
    table = Table(box=box.SIMPLE_HEAD, caption=Text(_caption(metrics)), caption_justify="left")
    table.add_column("")
    for name in (BEFORE, AFTER, "change"):
        table.add_column(name, justify="right")
    for row in [*_size_rows(metrics), *_figure_rows(metrics)]:
        table.add_row(*map(Text, row))
    return table


def write_history(path: Path, history: Sequence[Row]) -> None:
    """Write a CSV table with a row for each epoch; the widths become columns `width:<group>`."""
    rows = [_flatten(row) for row in history]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_plots(
    folder: Path,
    history: Sequence[Row],
    widths_before: Widths,
    widths_kept: Widths,
    metrics: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write `accuracy_size.png` and `channels.png` into `folder`, and return their paths."""
    curve, channels = folder / "accuracy_size.png", folder / "channels.png"
    write_atomically(curve, to_png(draw_accuracy_size(history, metrics)))
    write_atomically(channels, to_png(draw_channels(widths_before, widths_kept)))
    return curve, channels


def draw_accuracy_size(history: Sequence[Row], metrics: Mapping[str, Any]) -> Figure:
    """Draw validation AUC against parameters kept, an epoch a point, with the chosen one and the baseline."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="parameters kept in the trunk", ylabel="validation AUC")
    axes.plot(*_points(history), color=_FAINT, linewidth=1.2, zorder=1)
    for phase, color, marker in (("scale", _SCALE, "o"), ("refine", _REFINE, "s")):
        epochs = [row for row in history if row["phase"] == phase]
        label = {"scale": "scaling and removing", "refine": "refining"}[phase]
        axes.scatter(*_points(epochs), color=color, marker=marker, s=26, label=label, zorder=2)
    _mark_chosen(axes, history, metrics)
    _mark_baseline(axes, metrics)
    _show_parameters(axes, metrics["parameters"]["trunk"], min(row["parameters"] for row in history))
    axes.grid(color="#eeeeee")
    axes.legend(frameon=False, fontsize="small", loc="best")
    return figure


def draw_channels(before: Widths, kept: Widths) -> Figure:
    """Draw a bar for each layer: the channels kept, the channels removed, and their numbers."""
    figure = Figure(figsize=(min(24, max(7.2, 0.36 * len(before) + 1.5)), 4.4), layout="constrained")
    axes = figure.add_subplot(ylabel="channels")
    left = [kept.get(name, 0) for name in before]  # a layer behind the end of the trunk has none
    gone = [before[name] - number for name, number in zip(before, left, strict=True)]
    places = range(len(before))
    axes.bar(places, left, width=0.72, color=_SCALE, label="kept")
    axes.bar(places, gone, width=0.72, bottom=left, color=_FAINT, label="removed")
    for place, number in zip(places, left, strict=True):
        axes.annotate(
            f"{number}", (place, number), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xticks(places, label_layers(before), rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlim(-0.7, len(before) - 0.3)
    axes.tick_params(axis="x", length=0)
    total = sum(before.values())
    axes.set_title(
        f"{sum(left):,} of {total:,} channels kept ({percent(sum(left) / total)})", fontsize="medium"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


# --- the table


def _caption(metrics: Mapping[str, Any]) -> str:
    parameters, images = metrics["parameters"], metrics["n"]
    text = f"{percent(parameters['removed'])} of the trunk's parameters removed"
    if parameters.get("full"):
        text += f" ({percent(parameters['removed_of_full'])} of the full network's)"
    if layer := metrics["depth"]["layer"]:
        text += f".\nThe trunk ends behind {layer}{_describe_reading(metrics['depth'])}"
    if images:
        patients = f" of {metrics['patients']} patients" if "patients" in metrics else ""
        text += f".\n{images} test images{patients}; in brackets 95 % bootstrap intervals"
    if several := metrics.get("labels"):
        text += ".\nAUC by label: " + ", ".join(
            f"{printable(name)} {_value(told['auc'])}" for name, told in several.items()
        )
    text += "".join(f".\n{line}" for line in _describe_rules(metrics))
    if protected := metrics["groups"]["protected"]:
        every = len(protected) + metrics["groups"]["prunable"]
        text += (
            f".\n{len(protected)} of {every} channel groups left whole, since a removal would not be exact"
        )
    return f"{text}."


def _describe_rules(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line about probabilities, and one about what is called positive and what is not ruled out."""
    calibration, lines = metrics.get("calibration", {}), []
    if calibration.get("temperature", 1) != 1 and "after" in calibration:
        before, after = (calibration[side]["ece"]["value"] for side in ("before", "after"))
        lines.append(
            f"Temperature {calibration['temperature']:.2f}: calibration error {before:.3f} before, {after:.3f} after"
        )
    point, sets, parts = metrics.get("operating_point", {}), metrics.get("prediction_sets", {}), []
    if "sensitivity" in point:
        shares = [f"{name} {_value(point[name])}" for name in ("sensitivity", "specificity")]
        parts.append(f"At {point['threshold']:.3f}: {', '.join(shares)}")
    if "coverage" in sets:
        parts.append(f"Sets: {_value(sets['coverage'])} covered, {_value(sets['size'])} classes")
    return [*lines, *([". ".join(parts)] if parts else [])]


def _value(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f}"


def _describe_reading(depth: Mapping[str, Any]) -> str:
    """Return what a linear head reads there and at the trunk's own end, if it was tried."""
    aucs = depth["aucs"]
    if not aucs:
        return ""
    end = f", {aucs[END]:.3f} at its own end" if END in aucs else ""
    return f": a linear head reads AUC {aucs[depth['layer']]:.3f} there{end} (cross-validated)"


def _size_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    parameters, macs, size = metrics["parameters"], metrics["macs"], metrics["bytes"]
    before, after = parameters["trunk"], parameters["kept"]
    rows = [("trunk parameters", f"{before:,}", f"{after:,}", _times(before, after, "fewer"))]
    before, after = macs["trunk"], macs["kept"]
    rows.append(("MACs per image", shorten(before), shorten(after), _times(before, after, "fewer")))
    if "model" in size:  # a run that was not written to a folder has none
        before, after = size["trunk"], size["model"]
        change = _times(before, after, "smaller")
        rows.append(("size on disk", size_on_disk(before), size_on_disk(after), change))
    return rows


def _figure_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    names = {"auc": "AUC", "accuracy": "accuracy"}
    return [
        (title, _interval(before), _interval(after), f"{after['value'] - before['value']:+.3f}")
        for name, title in names.items()
        if (before := metrics["before"].get(name)) and (after := metrics.get(name))
    ]


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _times(before: float, after: float, word: str) -> str:
    return f"{before / after:.1f}x {word}"


# --- the history


def _flatten(row: Row) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "widths"}
    return flat | {f"width:{name}": width for name, width in row.get("widths", {}).items()}


# --- the pictures


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [row["parameters"] for row in rows], [row["validation_auc"] for row in rows]


def _mark_chosen(axes: Axes, history: Sequence[Row], metrics: Mapping[str, Any]) -> None:
    for row in history:
        if row["epoch"] == metrics["best_epoch"]:
            label = f"chosen: AUC {row['validation_auc']:.3f}, {percent(row['parameters_removed'])} removed"
            look: dict[str, Any] = {"color": _CHOSEN, "marker": "*", "s": 190, "edgecolor": "white"}
            axes.scatter(*_points([row]), **look, label=label, zorder=3)


def _mark_baseline(axes: Axes, metrics: Mapping[str, Any]) -> None:
    before = metrics["before"]
    side, auc = "validation", before.get("validation_auc")
    if auc is None and "auc" in before:
        side, auc = "test", before["auc"]["value"]
    if auc is not None:
        label = f"{BEFORE}: {side} AUC {auc:.3f}"
        axes.axhline(auc, color=_INK, linewidth=1.2, linestyle="--", label=label, zorder=1)


def _show_parameters(axes: Axes, trunk: int, fewest: int) -> None:
    """Count parameters below and, above, the share that is removed."""
    axes.set_xlim(0.75 * fewest, 1.3 * trunk)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    shares = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    left = {
        f"{100 * share:g} %": (1 - share) * trunk for share in shares if (1 - share) * trunk >= 0.75 * fewest
    }
    above = axes.secondary_xaxis("top")
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xticks(list(left.values()), list(left))
    above.set_xlabel("parameters removed")


def label_layers(widths: Widths) -> list[str]:
    """Return what each layer is called: as published for VGG16, else as in the network."""
    if list(widths.values()) == list(_VGG16_LAYERS.values()):
        return list(_VGG16_LAYERS)
    return [name.removeprefix("trunk.") for name in widths]
