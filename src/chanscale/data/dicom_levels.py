"""Stored values of a DICOM image to the grey levels that are shown, by PS3.3 C.11.1 and C.11.2, in 16 bits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chanscale.errors import UnreadableImageError

if TYPE_CHECKING:
    from pydicom import Dataset

Values = NDArray[np.float64]
Range = tuple[float, float]

_WHITE = 65535
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def to_levels(stored: NDArray[np.generic], dataset: "Dataset", *, frame: int) -> NDArray[np.uint16]:
    """Return (H, W) of grey stored values, or (H, W, 3) of colours, 0 (black) to 65535.

    `frame` counts from 0, and finds the values that a multi-frame file has for each. Raises UnreadableImageError.
    """
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return _look_up_colours(stored, dataset)
    if not kind.startswith("MONOCHROME"):
        return _spread(stored.astype(np.float64), (0, 2**dataset.BitsStored - 1))
    values, limits = _apply_modality(stored, dataset, _find_item(dataset, "PixelValueTransformation", frame))
    levels = _apply_voi(values, limits, dataset, _find_item(dataset, "FrameVOILUT", frame))
    return np.uint16(_WHITE) - levels if is_inverted(dataset) else levels


def is_inverted(dataset: "Dataset") -> bool:
    """Tell whether the lowest value is white.

    A digital radiograph that is MONOCHROME1 says INVERSE as well (PS3.3 C.8.11.1): both mean the same one inversion.
    """
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    return bool(dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE")


def apply_window(values: Values, *, centre: float, width: float, function: str = "LINEAR") -> Values:
    """Return shares of white, 0 to 1, by PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):  # far below the window, e to the power overflows, and the share is 0
            sigmoid: Values = 1 / (1 + np.exp(-4 * (values - centre) / width))
        return sigmoid
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return (values > centre).astype(np.float64)
    line: Values = ((values - centre) / width + 0.5).clip(0, 1)
    return line


def _find_item(dataset: "Dataset", macro: str, frame: int) -> "Dataset":
    """Return what holds a frame's values: its own functional group, the shared one, or the data set itself."""
    own = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    found = [group[f"{macro}Sequence"][0] for group in (*own, *shared) if group.get(f"{macro}Sequence")]
    return found[0] if found else dataset


def _stored_range(dataset: "Dataset") -> Range:
    bits, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)


def _apply_modality(stored: NDArray[np.generic], dataset: "Dataset", item: "Dataset") -> tuple[Values, Range]:
    """Return the values in the units of the modality, and the range that the bits of a file allow for them."""
    values, limits = stored.astype(np.float64), _stored_range(dataset)
    if item.get("ModalityLUTSequence"):
        return _look_up(values, item.ModalityLUTSequence[0], dataset, signed=limits[0] < 0)
    slope, intercept = _number(item, "RescaleSlope") or 1.0, _number(item, "RescaleIntercept") or 0.0
    low, high = sorted(slope * limit + intercept for limit in limits)
    return slope * values + intercept, (low, high)


def _apply_voi(values: Values, limits: Range, dataset: "Dataset", item: "Dataset") -> NDArray[np.uint16]:
    """Return grey levels by the VOI LUT, else by the first window that is one, else over all that the bits allow."""
    if item.get("VOILUTSequence"):
        return _spread(*_look_up(values, item.VOILUTSequence[0], dataset, signed=limits[0] < 0))
    centre, width = _number(item, "WindowCenter"), _number(item, "WindowWidth")
    function = str(item.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None or width < (1 if function == "LINEAR" else np.finfo(float).tiny):
        return _spread(values, limits)
    if function not in _FUNCTIONS:
        raise UnreadableImageError(
            f"wanted a VOI LUT Function of {', '.join(_FUNCTIONS)}, got another. Correct it, or remove the image."
        )
    return _spread(apply_window(values, centre=centre, width=width, function=function), (0, 1))


def _number(item: "Dataset", keyword: str) -> float | None:
    """Return a number of the header, the first of several, or None where it is missing."""
    value: Any = item.get(keyword)
    if value is None or value == "":
        return None
    number = float(value[0] if isinstance(value, Sequence) else value)
    if not np.isfinite(number):
        raise UnreadableImageError(f"wanted a finite number as {keyword}, got another. Correct it.")
    return number


def _look_up(values: Values, table: "Dataset", dataset: "Dataset", *, signed: bool) -> tuple[Values, Range]:
    """Return the entries for `values`, and the range of entries; below and above the table, its ends count."""
    count, first, bits = (int(part) for part in table.LUTDescriptor)
    if signed and first >= 2**15:  # written as unsigned, since the tag alone does not say which
        first -= 2**16
    entries = _read_entries(table["LUTData"], count or 2**16, dataset)
    places = np.rint(values - first).clip(0, len(entries) - 1).astype(np.intp)
    return entries[places], (0.0, 2.0**bits - 1)


def _read_entries(element: Any, count: int, dataset: "Dataset") -> Values:
    value = element.value
    if not isinstance(value, bytes):
        return np.atleast_1d(np.asarray(value, dtype=np.float64))[:count]
    # Entries of 8 bits may be packed, two in a word.
    packed = len(value) < 2 * count
    order = "<" if dataset.original_encoding[1] in (True, None) else ">"
    return np.frombuffer(value, np.uint8 if packed else f"{order}u2")[:count].astype(np.float64)


def _look_up_colours(stored: NDArray[np.generic], dataset: "Dataset") -> NDArray[np.uint16]:
    from pydicom.pixels.processing import apply_color_lut

    colours = apply_color_lut(stored, dataset)[..., :3]  # an alpha is for what lies below, and nothing does
    bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    top = 255 if bits <= 8 and colours.max() <= 255 else _WHITE
    return _spread(colours.astype(np.float64), (0, top))


def _spread(values: Values, limits: Range) -> NDArray[np.uint16]:
    """Return `values` with the lower limit at 0 and the upper at 65535."""
    low, high = limits
    levels: NDArray[np.uint16] = (
        np.rint((values - low) * (_WHITE / (high - low))).clip(0, _WHITE).astype(np.uint16)
    )
    return levels
