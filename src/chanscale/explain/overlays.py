"""A picture of an answer: the image under the map, the class, and the channels that made it."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from chanscale.explain.evidence import signed
from chanscale.explain.patches import Grey
from chanscale.plotting import to_png
from chanscale.wording import NOTICE

Floats = NDArray[np.float64]

LARGEST, SMALLEST = 1024, 640
"""Pixels of the longer side of the image that is drawn."""

FOR, AGAINST = (224, 82, 6), (20, 110, 220)
"""Red, green and blue, as on the page that an export writes."""

OPACITY = 0.6
FAINTER = 0.95
"""Share of a map that is fainter than full colour: its corners can outdo all the rest."""

_PANEL, _MARGIN, _LINE, _DPI = 430, 28, 19, 100
_INK, _SOFT, _TRACK = "#1d2326", "#586369", "#d9dcda"
_PATCH, _ROOM = 140, 120


@dataclass(frozen=True)
class Bar:
    """A line of the list beside the image: a name, and what it adds to the logit."""

    name: str
    value: float


@dataclass(frozen=True)
class Overlay:
    """What is drawn of one image.

    `values` (h, w): the map, positive `towards` a class, negative `against` it. `bars` add up to the logit that is
    called `sum_name`; there may be none. `rules`: lines on what the rules of the model make of the `shares`.
    """

    title: str
    image: Grey
    values: Floats
    towards: str
    against: str
    verdict: str
    shares: Mapping[str, float]
    rules: Sequence[str]
    bars: Sequence[Bar]
    sum_name: str
    caption: str

    @property
    def full(self) -> float:
        """The size of the evidence at full colour."""
        return full_colour(self.values)


def full_colour(values: Floats) -> float:
    """Return the size of the evidence that a map shows at full colour."""
    sizes = np.sort(np.abs(values), axis=None)
    return float(sizes[int(FAINTER * (sizes.size - 1))] or sizes[-1])


def paint_map(values: Floats, size: tuple[int, int], full: float) -> NDArray[np.uint8]:
    """Return a map (h, w) as colours (H, W, 4) over an image of `size` (W, H), interpolated; what is 0 is clear."""
    # A power: weak evidence lies nearly everywhere, and would hide the image.
    wide = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    strength = np.clip(np.abs(wide) / full, 0, 1) if full else np.zeros_like(wide)
    colours = np.where(wide[..., None] > 0, FOR, AGAINST)
    return np.dstack([colours, 255 * OPACITY * strength**1.5]).astype(np.uint8)


def draw_overlay(overlay: Overlay) -> bytes:
    """Return the bytes of a PNG, the same for the same overlay."""
    width, height = _shown_size(overlay.image.shape)
    caption = [*textwrap.wrap(overlay.caption, (width + _PANEL) // 7), NOTICE]
    below = 66 + _LINE * len(caption) + 6
    inner = max(height, _panel_height(overlay))
    figure, axes = _canvas(width + _PANEL + 3 * _MARGIN, inner + below + 2 * _MARGIN)
    _draw_image(axes, overlay, (_MARGIN, _MARGIN, width, height))
    end = _draw_panel(axes, overlay, width + 2 * _MARGIN, _MARGIN)
    _draw_bare(axes, overlay.image, width + 2 * _MARGIN, end + 12, _MARGIN + inner)
    top = _MARGIN + inner + 16
    _draw_legend(axes, overlay, _MARGIN, _MARGIN + height + 16, width)
    for place, line in enumerate(caption):
        last = line is caption[-1]
        text = _write(axes, _MARGIN, top + 54 + _LINE * place + 6 * last, line, size=9.5, color=_SOFT)
        text.set_weight("bold" if last else "normal")
    return _to_png(figure)


def draw_patches(title: str, patches: Sequence[tuple[Grey, str]]) -> bytes:
    """Return the bytes of a PNG: patches of images side by side, each with a line below."""
    wide = (_PATCH + 16) * max(3, len(patches)) + 2 * _MARGIN
    figure, axes = _canvas(wide, _PATCH + 110)
    _write(axes, _MARGIN, 22, title, size=12)
    for place, (patch, label) in enumerate(patches):
        left = _MARGIN + place * (_PATCH + 16)
        ratio = _PATCH / max(patch.shape)
        high, across = (max(1, round(side * ratio)) for side in patch.shape)
        _show(axes, patch, (left, 44, across, high), cmap="gray", vmin=0, vmax=255)
        for line, text in enumerate(label.split("\n")):
            _write(axes, left, 44 + _PATCH + 14 + 15 * line, _cut(text, 24), size=7.5, color=_SOFT)
    _write(axes, _MARGIN, _PATCH + 96, NOTICE, size=8, color=_SOFT)
    return _to_png(figure)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return width and height at which an image is drawn: its own aspect, neither tiny nor huge."""
    longer = max(shape)
    ratio = min(max(longer, SMALLEST), LARGEST) / longer
    return max(1, round(shape[1] * ratio)), max(1, round(shape[0] * ratio))


def _panel_height(overlay: Overlay) -> int:
    return 150 + 24 * (len(overlay.shares) + len(overlay.rules)) + 40 * (len(overlay.bars) + 1)


def _draw_image(axes: Axes, overlay: Overlay, place: tuple[int, int, int, int]) -> None:
    size = place[2:]
    grey = Image.fromarray(overlay.image).resize(size, Image.Resampling.LANCZOS)
    _show(axes, np.asarray(grey), place, cmap="gray", vmin=0, vmax=255)
    _show(axes, paint_map(overlay.values, size, overlay.full), place)


def _draw_bare(axes: Axes, image: Grey, left: int, top: int, bottom: int) -> None:
    """Draw the image without its map, where there is room for it."""
    high, wide = image.shape
    ratio = min((bottom - top) / high, _PANEL / wide)
    if ratio * max(high, wide) >= _ROOM:
        size = max(1, round(ratio * wide)), max(1, round(ratio * high))
        grey = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
        _show(axes, np.asarray(grey), (left, bottom - size[1], *size), cmap="gray", vmin=0, vmax=255)


def _draw_legend(axes: Axes, overlay: Overlay, left: int, top: int, width: int) -> None:
    """Draw the scale from against to for, and what its ends mean."""
    ramp = paint_map(np.linspace(-1, 1, 201)[None], (width, 1), 1.0)
    axes.add_patch(Rectangle((left, top), width, 12, facecolor="#b9bfc1", linewidth=0, zorder=-1))
    _show(axes, ramp, (left, top, width, 12))
    full, room = f"{overlay.full:.3g}", max(12, width // 17)
    _write(axes, left, top + 26, _cut(f"≤ −{full} {overlay.against}", room), size=10)
    _write(axes, left + width, top + 26, _cut(f"≥ +{full} {overlay.towards}", room), size=10, ha="right")


def _draw_panel(axes: Axes, overlay: Overlay, left: int, top: int) -> int:
    """Draw the answer, and the channels below it; return where they end."""
    _write(axes, left, top + 8, _cut(overlay.title, 58), size=9.5, color=_SOFT)
    _write(axes, left, top + 40, _cut(overlay.verdict, 28), size=19)
    y = top + 74
    for name, share in overlay.shares.items():
        _write(axes, left, y, _cut(name, 42), size=10.5)
        _write(axes, left + _PANEL, y, percent_of(share), size=10.5, ha="right")
        y += 24
    for line in overlay.rules:
        _write(axes, left, y, _cut(line, 58), size=9.5, color=_SOFT)
        y += 24
    if not overlay.bars:
        return y
    _write(axes, left, y + 22, _cut(f"What adds up to {overlay.sum_name}", 58), size=9.5, color=_SOFT)
    _draw_bars(axes, overlay.bars, left, y + 50)
    return y + 70 + 40 * len(overlay.bars)


def _draw_bars(axes: Axes, bars: Sequence[Bar], left: int, top: int) -> None:
    largest = max(abs(bar.value) for bar in bars) or 1.0
    middle, reach = left + _PANEL / 2, _PANEL / 2
    for place, bar in enumerate(bars):
        y = top + 40 * place
        _write(axes, left, y, _cut(bar.name, 46), size=10)
        _write(axes, left + _PANEL, y, signed(bar.value), size=10, ha="right")
        axes.add_patch(Rectangle((left, y + 11), _PANEL, 7, facecolor=_TRACK, linewidth=0))
        colour = tuple(part / 255 for part in (FOR if bar.value > 0 else AGAINST))
        axes.add_patch(
            Rectangle((middle, y + 11), reach * bar.value / largest, 7, facecolor=colour, linewidth=0)
        )
    y = top + 40 * len(bars)
    _write(axes, left, y, "sum", size=10, weight="bold")
    total = signed(sum(bar.value for bar in bars))
    _write(axes, left + _PANEL, y, total, size=10, ha="right", weight="bold")


def percent_of(share: float) -> str:
    """Return a probability in percent, never 100 or 0: a model is not that sure."""
    if share > 0.999:
        return "> 99.9 %"
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """Return a white figure, and axes that count its pixels from the upper left."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def _show(axes: Axes, pixels: NDArray[np.uint8], place: tuple[int, int, int, int], **options: Any) -> None:
    left, top, width, height = place
    extent = (left, left + width, top + height, top)
    axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest", **options)
    axes.set_xlim(0, axes.figure.bbox.width)
    axes.set_ylim(axes.figure.bbox.height, 0)


def _write(axes: Axes, x: float, y: float, text: str, **options: Any) -> Any:
    # Names come from files: a dollar in one is no formula.
    return axes.text(x, y, text, va="center", parse_math=False, **{"color": _INK, **options})


def _cut(text: str, length: int) -> str:
    """Return `text`, without its middle where it is too long."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[len(text) - (length - 1 - half) :]}"


def _to_png(figure: Figure) -> bytes:
    with warnings.catch_warnings():
        # A name may be in a script that the font lacks; it stands whole in the JSON.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        return to_png(figure, dpi=_DPI, compress_level=3)
