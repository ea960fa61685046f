"""What all pictures share: a logarithmic axis that spans what is drawn, and the bytes of a file."""

import io
import math
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MARGIN = 0.05
"""Share of the axis that is left free on either side."""


def add_log_axes(figure: Figure, values: Iterable[float], *, xlabel: str, ylabel: str) -> Axes:
    """Add axes to `figure` whose logarithmic x axis spans the `values`, and a decade at least; return them.

    The limits are not left to matplotlib: it takes those of one value to differ where the logarithm of the processor is
    not undone to the last bit, as with AVX-512, and then shows the width of that.
    """
    exponents = [math.log10(value) for value in values]
    low, high = min(exponents), max(exponents)
    missing = max(0.0, 1 - (high - low)) / 2
    margin = missing + _MARGIN * max(1.0, high - low)
    axes = figure.add_subplot(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    return axes


def to_png(figure: Figure, *, dpi: float = 150, **saving: Any) -> bytes:
    """Return the bytes of a PNG file, the same for the same figure; `saving`: what Pillow takes for one."""
    content = io.BytesIO()
    # No name of a program or a version: the same run gives the same bytes.
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs=saving)
    return content.getvalue()
