"""Compressed frames of DICOM: their size before they are unpacked, and the JPEGs that pydicom leaves to others.

Lossless JPEG, the commonest compression in archives, and JPEG of 12 bits, are decoded by imagecodecs.
"""

import struct
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from chanscale.errors import UnreadableImageError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import DecodeRunner

# Asked for by pydicom of any plug-in; both are dependencies.
DECODER_DEPENDENCIES: dict[str, tuple[str, ...]] = {}

_LABEL = "chanscale"
_REGISTERING = Lock()
_JPEG2000 = b"\xff\x4f\xff\x51"
_NO_LENGTH = (0x01, *range(0xD0, 0xD9))  # markers that stand alone
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # tables that stand among the markers of a frame


def is_available(_: str) -> bool:
    """Tell pydicom that what it needs is installed."""
    return True


def register() -> None:
    """Make pydicom decode lossless JPEG, and JPEG of 12 bits, by `decode_frame`."""
    from pydicom.pixels.decoders import base

    with _REGISTERING:
        for decoder in (
            base.JPEGLosslessDecoder, base.JPEGLosslessSV1Decoder, base.JPEGExtended12BitDecoder,
        ):  # fmt: skip
            if _LABEL not in decoder.available_plugins:
                decoder.add_plugin(_LABEL, (__name__, "decode_frame"))


def decode_frame(data: bytes, runner: "DecodeRunner") -> bytes:
    """Return the samples of one JPEG frame, colour by pixel; a plug-in of pydicom."""
    import imagecodecs  # here, since few images need it

    pixels = np.asarray(imagecodecs.jpeg8_decode(data))
    runner.set_option("bits_allocated", 8 * pixels.itemsize)
    runner.set_option("planar_configuration", 0)
    return pixels.tobytes()


def check_size(dataset: "Dataset", index: int) -> None:
    """Raise UnreadableImageError where a compressed frame is not of the size that its header says.

    The header's was held against the limit; a decoder makes room for what the frame says.
    """
    from pydicom.encaps import get_frame

    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    frames = int(dataset.get("NumberOfFrames") or 1)
    size = find_size(get_frame(dataset.PixelData, index, number_of_frames=frames))
    if size is not None and size != (dataset.Rows, dataset.Columns):
        raise UnreadableImageError(
            f"wanted {dataset.Columns} x {dataset.Rows} pixels, as the header says, got {size[1]} x {size[0]} "
            "in the compressed frame. Get it again, or remove it."
        )


def find_size(data: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG, JPEG-LS or JPEG 2000 codestream, or None of anything else."""
    if data.startswith(_JPEG2000):
        right, bottom, left, top = struct.unpack_from(">4I", data, 8)
        return bottom - top, right - left
    if not data.startswith(b"\xff\xd8"):
        return None
    return _find_jpeg_size(data)


def _find_jpeg_size(data: Any) -> tuple[int, int] | None:
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME):
            rows, columns = struct.unpack_from(">2H", data, place + 5)
            return rows, columns
        alone = marker in _NO_LENGTH or marker == 0xFF
        place += (1 if marker == 0xFF else 2) if alone else 2 + struct.unpack_from(">H", data, place + 2)[0]
    return None
