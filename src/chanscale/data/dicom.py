"""One frame of a DICOM file to 16-bit pixels, and what of its header the listing needs.

pydicom's own words may hold values of the header, and with them a patient's: none of them is passed on.
"""

import io
import logging
import re
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chanscale.data.dicom_levels import to_levels
from chanscale.errors import UnreadableImageError

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})

_WANTED = "wanted a DICOM image, grey or RGB, 1 to 16 bits a channel"
_MAGIC = slice(128, 132)
_DIRECTORY = b"1.2.840.10008.1.3.10"  # the storage class of a DICOMDIR, at the front of its header
_HEADLESS = (
    b"\x08\x00",
    b"\x00\x08",
    b"\x02\x00",
)  # the group that an older file without the magic starts with
_SAMPLES = {
    "MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1,
    "RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3,
}  # fmt: skip
_QUIET = ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls")
_QUIET_MODULES = rf"({'|'.join(_QUIET)})(\.|$)"
_QUIET_FILTER = ("ignore", None, Warning, re.compile(_QUIET_MODULES), 0)
_MAX_INFLATED = 2**30
_HEAD = 512  # bytes that tell whether a file is DICOM
_CHUNK = 2**20  # bytes, to read and to unpack at a time
_FRAME = re.compile(r"#[1-9]\d*\Z")
_LISTED = ("PatientID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")


@dataclass(frozen=True)
class Frame:
    """One frame of a DICOM file; `number` counts from 1, as DICOM does."""

    path: Path
    number: int

    def __str__(self) -> str:
        return name_frame(str(self.path), self.number)


@dataclass(frozen=True)
class Header:
    """What the header says of a DICOM file: the patient (None where it does not say), frames, channels, pixels."""

    patient: str | None = field(repr=False)
    frames: int
    channels: int
    width: int
    height: int


def name_frame(name: str, number: int) -> str:
    """Return what a frame of the file `name` is called: `film.dcm#2`."""
    return f"{name}#{number}"


def name_file(name: str) -> str:
    """Return the name of the file that an image is of: `film.dcm` for `film.dcm#2`, and for itself."""
    return _FRAME.sub("", name)


def is_dicom(path: Path, head: bytes) -> bool:
    """Tell by name, or by the first 132 bytes, whether a file is DICOM."""
    return path.suffix.lower() in DICOM_SUFFIXES or head[_MAGIC] == b"DICM"


def is_listed(path: Path) -> bool:
    """Tell whether a file in a folder is a DICOM image to take: by its suffix, or by its magic if it has none.

    A number is no suffix: files are often named by their UID. Directories of a medium (DICOMDIR) are no images.
    """
    if path.stem.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix.strip(".0123456789") or not path.is_file():  # a pipe would never answer
        return False
    try:
        head = _read_head(path)
    except OSError:  # it may be one: reading it says what is wrong
        return True
    return head[_MAGIC] == b"DICM" and _DIRECTORY not in head


def read_header(path: Path) -> Header | None:
    """Return what the header of a file says, or None where the file is no DICOM or cannot be read."""
    try:
        with path.open("rb") as file:
            return header_of(path, file)
    except OSError:
        return None


def header_of(path: Path, file: BinaryIO) -> Header | None:
    """Return the same of the file at `path` that is open, and at its start."""
    try:
        if not is_dicom(path, file.read(_HEAD)):
            return None
        file.seek(0)
        _refuse_inflated(file)
        return _to_header(_parse(file, stop_before_pixels=True, specific_tags=list(_LISTED)))
    except Exception:  # reading the pixels says what is wrong
        return None


def _to_header(dataset: "Dataset") -> Header:
    _complete(dataset)
    patient = str(dataset.get("PatientID") or "").strip()
    channels = 1 if dataset.PhotometricInterpretation.startswith("MONOCHROME") else 3
    frames = 1 if _is_bomb(dataset) else _count_frames(dataset)
    width, height = (int(dataset.get(keyword) or 0) for keyword in ("Columns", "Rows"))
    return Header(patient or None, frames, channels, width, height)


def read_dicom(data: bytes, *, frame: int = 1) -> NDArray[np.uint16]:
    """Decode one frame of the bytes of a DICOM file, and bring it to what is shown, in 16 bits: 0 is black.

    Returns (H, W) or (H, W, 3), 0 to 65535. Grey: modality LUT or rescale, VOI LUT or the first window, inversion
    (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2). Raises UnreadableImageError, without a value of the header.
    """
    try:
        return _decode(data, frame - 1)
    except UnreadableImageError:
        raise
    # pydicom raises nearly anything on a damaged file. Only the kind is told: the words may name a patient.
    except Exception as error:
        raise UnreadableImageError(
            f"{_WANTED}, got one that cannot be decoded ({type(error).__name__}). Get it again, or remove it."
        ) from None


def _decode(data: bytes, index: int) -> NDArray[np.uint16]:
    from pydicom.pixels.utils import pixel_array

    from chanscale.data.dicom_codecs import check_size, register

    if data[_MAGIC] != b"DICM" and data[:2] not in _HEADLESS:
        raise UnreadableImageError(
            f"{_WANTED}, got something else, whatever the name says. Convert it, or remove it."
        )
    register()
    file = io.BytesIO(data)
    _refuse_inflated(file)
    dataset = _parse(file)
    _refuse(dataset, index)
    check_size(dataset, index)
    return to_levels(np.asarray(pixel_array(dataset, index=index)), dataset, frame=index)


def _parse(file: Any, **options: Any) -> "Dataset":
    """Read a data set, and say how it is written where its front is missing."""
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    _silence()
    dataset = dcmread(file, force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _silence() -> None:
    """Let no word of the decoders reach a log or a screen: it may hold a value of the header."""
    # Not catch_warnings, which is not safe in threads, and images are decoded in several: a filter that stays.
    if _QUIET_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET_MODULES)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _complete(dataset: "Dataset") -> None:
    """Set what a file may lack, and what follows from the rest: grey, unsigned, all bits in use."""
    kind = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
    samples = int(dataset.get("SamplesPerPixel") or _SAMPLES.get(kind, 1))
    defaults = {
        "SamplesPerPixel": samples,
        "BitsStored": dataset.get("BitsAllocated"),
        "PixelRepresentation": 0,
        "PlanarConfiguration": 0,
    }
    for keyword, value in defaults.items():
        if dataset.get(keyword) in (None, ""):
            setattr(dataset, keyword, value)
    dataset.PhotometricInterpretation = kind or ("MONOCHROME2" if samples == 1 else "RGB")


def _count_frames(dataset: "Dataset") -> int:
    return max(int(dataset.get("NumberOfFrames") or 1), 1)


def _is_bomb(dataset: "Dataset") -> bool:
    """Tell whether all frames together have more pixels than Pillow would open."""
    pixels = int(dataset.get("Rows") or 1) * int(dataset.get("Columns") or 1) * _count_frames(dataset)
    return Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS


def _refuse(dataset: "Dataset", index: int) -> None:
    """Complete the data set, and stop at what would be read wrongly, or would not fit in memory."""
    if "PixelData" not in dataset:
        raise UnreadableImageError(f"{_WANTED}, got a DICOM file without pixels. Remove it.")
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        if not dataset.get(keyword):
            raise UnreadableImageError(
                f"{_WANTED}, got a header without {keyword}. Get it again, or remove it."
            )
    _complete(dataset)
    bits, samples, frames = dataset.BitsStored, dataset.SamplesPerPixel, _count_frames(dataset)
    if not bits or not 1 <= bits <= 16:
        raise UnreadableImageError(f"{_WANTED}, got {bits or 'no number of'} bits. Convert it, or remove it.")
    if dataset.get("HighBit") not in (None, "", bits - 1):  # the decoders take the low bits
        raise UnreadableImageError(
            f"{_WANTED}, got {bits} bits of which the highest is bit {dataset.HighBit}, not {bits - 1}. "
            "Convert it, or remove it."
        )
    if samples != _SAMPLES.get(dataset.PhotometricInterpretation):
        raise UnreadableImageError(
            f"{_WANTED}, got {samples} channels of another kind. Convert it to grey or RGB."
        )
    if _is_bomb(dataset):
        raise UnreadableImageError(
            f"wanted at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {dataset.Columns} x {dataset.Rows} in {frames} "
            f"frame{'' if frames == 1 else 's'}: a decompression bomb, or an image to make smaller first."
        )
    if index >= frames:
        raise UnreadableImageError(
            f"wanted frame {index + 1}, got a file of {frames}. Open the images again."
        )


def _refuse_inflated(file: BinaryIO) -> None:
    """Stop at a deflated data set that would grow without bounds, as pydicom unpacks it whole; else go to the start."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    head = file.read(2048)
    if head[_MAGIC] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in head:
        file.seek(_MAGIC.stop)
        read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        if _inflates_beyond(file, _MAX_INFLATED):
            raise UnreadableImageError(
                f"wanted at most {_MAX_INFLATED:,} bytes, got more, deflated: a decompression bomb. Remove it."
            )
    file.seek(0)


def _inflates_beyond(file: BinaryIO, most: int) -> bool:
    """Tell whether what follows in `file` is `most` bytes or more when unpacked; a chunk at a time is held."""
    unpacking, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while size < most and not unpacking.eof and (part := unpacking.unconsumed_tail or file.read(_CHUNK)):
        size += len(unpacking.decompress(part, _CHUNK))
    return size >= most


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)
