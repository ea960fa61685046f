"""One image file, or one array, to 16-bit pixels of one size."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from chanscale.data.dicom import DICOM_SUFFIXES, Frame, is_dicom, read_dicom, read_header
from chanscale.data.volumes import VOLUME_SUFFIXES, is_volume
from chanscale.errors import UnreadableImageError, one_line

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"}) | DICOM_SUFFIXES | VOLUME_SUFFIXES
FULL_RANGE = 65535

Pixels = NDArray[np.uint16]
Source = Path | str | Frame | NDArray[np.generic]

FORMATS = ("PNG", "JPEG", "TIFF")
_WANTED = "wanted a PNG, JPEG, TIFF or DICOM image, grey or RGB, 8 or 16 bits a channel"
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY = ("1", "L", "LA", *_WIDE_GREY)
_COLOUR = ("P", "PA", "RGB", "RGBA")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KIND = slice(24, 26)  # bits and colour type: the IHDR chunk always comes first
_WIDE_GREY_ALPHA, _WIDE_RGB, _WIDE_RGBA = b"\x10\x04", b"\x10\x02", b"\x10\x06"
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_ORIENTATION, _TIFF_EXTRA = 258, 262, 274, 338
_UNSPECIFIED = 0  # an extra channel that is no alpha; Pillow would drop it unasked
_WHITE_IS_ZERO = 0
_UPRIGHT: dict[int, Callable[[NDArray[np.generic]], NDArray[np.generic]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def read_image(source: Source, *, size: int | None, name: str | None = None) -> Pixels:
    """Decode one image and resize it to a square, keeping all its grey levels; with no `size`, as large as it is.

    Returns (C, size, size), 0 to 65535, C = 1 (grey) or 3 (RGB). An 8-bit value v becomes exactly 257 v; a
    16-bit value stays; of DICOM, see `read_dicom`. The aspect ratio is not kept: the image is squashed, so
    nothing of it is cut off. An image that already has the size is not filtered; others go through an
    antialiasing Lanczos filter, in float32. `source` is a path, a frame of a DICOM file, or an array (H, W),
    (H, W, 1) or (H, W, 3) of uint8 or uint16; `name` stands for it in errors. Raises UnreadableImageError, and
    nothing else, for an image that cannot be used.
    """
    label = name or ("array" if isinstance(source, np.ndarray) else str(source))
    try:
        pixels = _check_array(source) if isinstance(source, np.ndarray) else _decode(source)
        planes = _widen(pixels)
        return planes if size is None else _resize(planes, size)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{label}: {error}") from error
    # Decoders raise nearly anything on a damaged file: OSError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise UnreadableImageError(f"{label}: {_WANTED}, {_explain(error)}") from error


def count_channels(source: Source) -> int:
    """Return 1 or 3 by the header alone; 1 for what cannot be read, of which `read_image` will say why."""
    if isinstance(source, np.ndarray):
        return 3 if source.ndim == 3 and source.shape[-1] == 3 else 1
    path = source.path if isinstance(source, Frame) else Path(source)
    if is_volume(path):
        return 1
    if header := read_header(path):
        return header.channels
    try:
        with path.open("rb") as file:
            head = file.read(_PNG_KIND.stop)
            if _is_wide_png(head):  # Pillow has no mode for grey with alpha in 16 bits, and calls it RGBA
                return 1 if head[_PNG_KIND] == _WIDE_GREY_ALPHA else 3
            with Image.open(file, formats=FORMATS) as image:
                return 3 if image.mode in _COLOUR else 1
    except Exception:
        return 1


def _decode(source: Path | str | Frame) -> NDArray[np.generic]:
    path, number = (source.path, source.number) if isinstance(source, Frame) else (Path(source), 1)
    if is_volume(path):
        raise UnreadableImageError(f"{_WANTED}, got a volume. Read it with a network for volumes.")
    data = path.read_bytes()
    if not data:
        raise UnreadableImageError(f"{_WANTED}, got an empty file of 0 bytes. Get it again, or remove it.")
    if is_dicom(path, data):
        return read_dicom(data, frame=number)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _refuse(image)
        bits = _read_tag(image, _TIFF_BITS, ())
        # Pillow would drop the lower 8 bits of each colour.
        if _is_wide_png(data):
            return _decode_wide_png(image, data)
        return _decode_wide_tiff(data) if 16 in bits and len(bits) > 1 else _to_array(image, bits)


def _is_wide_png(head: bytes) -> bool:
    """Whether a file that starts so is a PNG with 16 bits, and with colour or alpha."""
    return head.startswith(_PNG) and head[_PNG_KIND] in (_WIDE_GREY_ALPHA, _WIDE_RGB, _WIDE_RGBA)


def _refuse(image: Image.Image) -> None:
    """Stop at what would be read, but read wrongly."""
    frames = getattr(image, "n_frames", 1)
    # An MPO is a JPEG photograph, followed by smaller views of it, or by the other eye's.
    if frames > 1 and image.format != "MPO":
        raise UnreadableImageError(
            f"wanted one image, got a file of {frames}. Save each in a file of its own."
        )
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"wanted at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {image.width} x {image.height}: "
            "a decompression bomb, or an image to make smaller first."
        )
    if image.mode not in _GREY + _COLOUR:
        raise UnreadableImageError(f"{_WANTED}, got Pillow mode {image.mode!r}. Convert it to grey or RGB.")
    if _UNSPECIFIED in _read_tag(image, _TIFF_EXTRA, ()):
        count = len(_read_tag(image, _TIFF_BITS, ()))
        raise UnreadableImageError(f"{_WANTED}, got {count} channels. Convert it to grey or RGB.")


def _to_array(image: Image.Image, bits: Sequence[int]) -> NDArray[np.generic]:
    image.load()
    if 12 in bits:
        raise UnreadableImageError("wanted 8 or 16 bits a channel, got 12. Save it with 16 bits.")
    _refuse_transparency(image)
    upright = ImageOps.exif_transpose(image)
    if image.mode not in _WIDE_GREY:
        return np.asarray(upright.convert("L" if image.mode in _GREY else "RGB"))
    array = np.asarray(upright).astype(np.uint16)  # also brings big-endian pixels to this machine's order
    # Pillow inverts files in which white is 0 when they have 8 bits, and not when they have 16.
    return FULL_RANGE - array if _read_tag(image, _TIFF_PHOTOMETRIC, None) == _WHITE_IS_ZERO else array


def _read_tag(image: Image.Image, tag: int, default: Any) -> Any:
    return image.tag_v2.get(tag, default) if isinstance(image, TiffImageFile) else default


def _refuse_transparency(image: Image.Image) -> None:
    if not image.has_transparency_data:
        return
    if image.mode in _WIDE_GREY:  # Pillow cannot convert these: one grey level is the transparent one
        opaque = not np.any(np.asarray(image) == image.info["transparency"])
    else:
        opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    if not opaque:
        raise UnreadableImageError(
            "wanted an opaque image, got transparent pixels, and what lies behind them is unknown. "
            "Save it without its alpha channel."
        )


def _decode_wide_png(image: Image.Image, data: bytes) -> NDArray[np.generic]:
    """Return 16-bit RGB (H, W, 3), or grey (H, W, 1)."""
    import imagecodecs  # here, since few images need it

    colours = _drop_opaque_alpha(np.asarray(imagecodecs.png_decode(data)))
    return _turn_upright(colours, image.getexif().get(_TIFF_ORIENTATION))


def _decode_wide_tiff(data: bytes) -> NDArray[np.generic]:
    """Return 16-bit RGB (H, W, 3)."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        array = np.asarray(page.asarray())
        orientation = int(page.tags.valueof(_TIFF_ORIENTATION, 1))
        colour = page.photometric == tifffile.PHOTOMETRIC.RGB and array.dtype == np.uint16
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            array = np.moveaxis(array, 0, -1)
    if not colour or array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise UnreadableImageError(
            f"{_WANTED}, got a TIFF of photometric {page.photometric!r}, shape {array.shape}, "
            f"{array.dtype}. Convert it to grey or RGB."
        )
    return _turn_upright(_drop_opaque_alpha(array), orientation)


def _turn_upright(array: NDArray[np.generic], orientation: int | None) -> NDArray[np.generic]:
    return _UPRIGHT[orientation](array) if orientation in _UPRIGHT else array


def _drop_opaque_alpha(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return (H, W, 1 or 3) of (H, W, C), 16 bits."""
    if array.shape[-1] in (1, 3):
        return array
    if np.any(array[..., -1] != FULL_RANGE):
        raise UnreadableImageError(
            "wanted an opaque image, got transparent pixels. Save it without its alpha."
        )
    return array[..., :-1]


def _check_array(array: NDArray[np.generic]) -> NDArray[np.generic]:
    grey_or_rgb = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3))
    if array.dtype not in (np.uint8, np.uint16) or not grey_or_rgb or array.size == 0:
        raise UnreadableImageError(
            f"wanted an array (H, W), (H, W, 1) or (H, W, 3) of uint8 or uint16, "
            f"got {array.shape} of {array.dtype}."
        )
    return array


def _widen(pixels: NDArray[np.generic]) -> Pixels:
    """Bring (H, W) or (H, W, C) to (C, H, W), 0 to 65535."""
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    wide = planes.astype(np.uint16)
    return wide * np.uint16(257) if pixels.dtype == np.uint8 else wide


def _resize(planes: Pixels, size: int) -> Pixels:
    if planes.shape[1:] == (size, size):
        return planes
    return np.stack([_resize_plane(plane, size) for plane in planes])


def _resize_plane(plane: Pixels, size: int) -> Pixels:
    image = Image.fromarray(plane.astype(np.float32))  # Pillow filters 16-bit integers without antialiasing
    filtered = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    rounded: Pixels = np.rint(filtered).clip(0, FULL_RANGE).astype(np.uint16)  # Lanczos overshoots at edges
    return rounded


def _explain(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "got something else, whatever the name says. Convert it, or remove it."
    if isinstance(error, OSError) and error.strerror:
        return f"got none: {error.strerror}."
    return f"got one that cannot be decoded ({one_line(error)}). Get it again, or remove it."
