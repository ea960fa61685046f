"""The plots of the page, as SVG that takes its colours from the page's style sheet."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from chanscale.report_page.curves import GRID, Bin, Roc
from chanscale.wording import percent, shorten

Points = Iterable[tuple[float, float]]

TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BEYOND = 1e-9


@dataclass(frozen=True)
class Frame:
    """Where data lie on the paper: ranges of x and y, and the rectangle for them, in units of the drawing."""

    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    left: float = 46
    top: float = 10
    width: float = 340
    height: float = 300
    log_x: bool = False

    @property
    def right(self) -> float:
        """The right edge of the rectangle."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge of the rectangle."""
        return self.top + self.height

    def across(self, value: float) -> float:
        """Return where an x lies."""
        low, high = map(math.log, self.x) if self.log_x else self.x
        place = math.log(value) if self.log_x else value
        return self.left + self.width * (place - low) / (high - low)

    def up(self, value: float) -> float:
        """Return where a y lies."""
        return self.bottom - self.height * (value - self.y[0]) / (self.y[1] - self.y[0])

    def path(self, points: Points) -> str:
        """Return a line through `points`, as SVG has it."""
        return "M" + " ".join(f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in points)


UNIT = Frame()
"""For two shares, from 0 to 1 each."""


def draw_roc(curves: Mapping[str, Roc], point: tuple[float, float] | None) -> Markup:
    """Draw ROC curves by class, the band of a single one, and the point (1 - specificity, sensitivity), if any."""
    parts = [_path("diagonal", UNIT.path([(0, 0), (1, 1)]))]
    for place, curve in enumerate(curves.values(), start=1):
        if len(curves) == 1 and not math.isnan(curve.low[0]):
            edge = [*zip(GRID, curve.high, strict=True), *zip(GRID[::-1], curve.low[::-1], strict=True)]
            parts.append(_path("band", UNIT.path(edge) + "Z"))
        line = zip(curve.false_positive, curve.true_positive, strict=True)
        parts.append(_path(f"curve c{place}", UNIT.path(line)))
    if point:
        parts.append(_circle("point", UNIT, *point, radius=7, name="roc-point"))
    areas = ", ".join(f"{name}: {curve.area:.3f}" for name, curve in curves.items())
    axes = _axes(UNIT, "1 − specificity", "sensitivity", _shares(TICKS), _shares(TICKS))
    return _drawing(f"ROC curve; area under it {areas}", [axes, *parts], UNIT)


def draw_calibration(bins: Sequence[Bin], said: str, right: str, *, before: Sequence[Bin] = ()) -> Markup:
    """Draw what was right against what was said, with Wilson intervals, and how many images each bin holds.

    `before`: the bins of the same images before calibration, as a faint line; none: no line.
    """
    frame = Frame(height=240)
    counts = Frame(top=frame.bottom + 40, height=50, y=(0, max(one.count for one in bins)))
    parts = [_path("diagonal", frame.path([(0, 0), (1, 1)]))]
    if before:
        parts.append(_path("curve before", frame.path((one.mean, one.share) for one in before)))
    parts.append(_path("curve c1", frame.path((one.mean, one.share) for one in bins)))
    for one in bins:
        parts.append(_path("whisker", frame.path([(one.mean, one.share_low), (one.mean, one.share_high)])))
        title = f"{one.count} images, said {percent(one.mean)}, were {percent(one.share)}"
        parts.append(_circle("dot", frame, one.mean, one.share, title=title))
        parts.append(_bar(counts, one))
    axes = _axes(frame, "", right, _shares(TICKS), _shares(TICKS))
    below = _axes(counts, said, "images", [], [])
    return _drawing("Calibration curve, and the number of images in each bin", [axes, below, *parts], counts)


def _bar(counts: Frame, one: Bin) -> Markup:
    x, top = counts.across(one.low) + 1, counts.up(one.count)
    width = counts.across(one.high) - counts.across(one.low) - 2
    return Markup(
        '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
        '<text class="count" x="{:.1f}" y="{:.1f}">{}</text>'
    ).format(x, top, width, counts.bottom - top, x + width / 2, top - 3, one.count)


def draw_path(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Markup:
    """Draw validation AUC against the parameters of the trunk, an epoch a point, and the epoch that was chosen."""
    rows = [row for row in history if _is_number(row.get("validation_auc"))]
    aucs = [row["validation_auc"] for row in rows]
    trunk, fewest = metrics["parameters"]["trunk"], min(row["parameters"] for row in rows)
    bottom = math.floor(10 * min(aucs) - _BEYOND) / 10
    frame = Frame((0.8 * fewest, 1.15 * trunk), (max(0.0, bottom), 1.0), height=250, log_x=True)
    places = [(row["parameters"], row["validation_auc"]) for row in rows]
    parts = [_path("way", frame.path(places))]
    for row, place in zip(rows, places, strict=True):
        title = f"epoch {row['epoch'] + 1}: AUC {place[1]:.3f}, {shorten(place[0])} parameters"
        chosen = row["epoch"] == metrics["best_epoch"]
        parts.append(_circle(f"epoch {row['phase']}", frame, *place, title=title))
        if chosen:
            parts.append(_circle("chosen", frame, *place, radius=10))
    ticks = [(value, shorten(value)) for value in _decades(*frame.x)]
    steps = [round(bottom + 0.1 * step, 1) for step in range(round(10 * (1 - bottom)) + 1)]
    axes = _axes(frame, "parameters kept in the trunk", "validation AUC", ticks, _shares(steps))
    return _drawing("Validation AUC against parameters, epoch by epoch", [axes, *parts], frame)


def _decades(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    steps = (1, 2, 5) if high / low < 50 else (1,)
    values = [step * 10.0**power for power in range(first, first + 12) for step in steps]
    return [value for value in values if low <= value <= high]


def _shares(values: Iterable[float]) -> list[tuple[float, str]]:
    return [(value, f"{value:.1f}") for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _axes(
    frame: Frame, across: str, up: str, across_ticks: list[tuple[float, str]], up_ticks: list[tuple[float, str]],
) -> Markup:  # fmt: skip
    parts = [_path("frame", f"M{frame.left},{frame.top}V{frame.bottom}H{frame.right}")]
    for value, text in across_ticks:
        x = frame.across(value)
        parts.append(_text("tick middle", x, frame.bottom + 17, text))
        parts.append(_path("grid", f"M{x:.1f},{frame.top}V{frame.bottom}"))
    for value, text in up_ticks:
        y = frame.up(value)
        parts.append(_text("tick end", frame.left - 6, y + 4.5, text))
        parts.append(_path("grid", f"M{frame.left},{y:.1f}H{frame.right}"))
    below = 36 if across_ticks else 20
    parts.append(_text("axis middle", frame.left + frame.width / 2, frame.bottom + below, across))
    parts.append(_sideways(13, frame.top + frame.height / 2, up))
    return Markup("").join(parts)


def _drawing(label: str, parts: Iterable[Markup], lowest: Frame) -> Markup:
    width, height = lowest.right + 12, lowest.bottom + 40
    return Markup('<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}">{}</svg>').format(
        label, width, height, Markup("").join(parts)
    )


def _path(kind: str, line: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, line)


def _circle(
    kind: str, frame: Frame, x: float, y: float, *, radius: float = 4.5, name: str = "", title: str = ""
) -> Markup:
    inner = Markup("<title>{}</title>").format(title) if title else ""
    named = Markup(' id="{}"').format(name) if name else ""
    return Markup('<circle class="{}"{} cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>').format(
        kind, named, frame.across(x), frame.up(y), radius, inner
    )


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _sideways(x: float, y: float, text: str) -> Markup:
    return Markup(
        '<text class="axis middle" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>'
    ).format(x, y, text)
