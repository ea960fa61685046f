"""DICOM files for tests: written by pydicom, from arrays, with whatever tags a test wants."""

from pathlib import Path

import imagecodecs
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

DIGITAL_RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.1.1"
COMPRESSIONS = (RLELossless, JPEGLSLossless, JPEG2000Lossless)
"""What pydicom and the decoders can write."""
JPEGS = {JPEGLosslessSV1: {"lossless": True}, JPEGExtended12Bit: {"bitspersample": 12, "level": 99}}
"""What imagecodecs writes, and how."""


def dicom(array, *, bits: int = 16, photometric: str = "MONOCHROME2", **tags) -> Dataset:
    """Return a data set of (H, W), (frames, H, W), or (H, W, 3) for colours; `tags` by keyword, None: none such."""
    colour = photometric.startswith(("RGB", "YBR"))
    shape = array.shape if colour or array.ndim == 3 else (1, *array.shape)
    rows, columns = shape[:2] if colour else shape[1:]
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = DIGITAL_RADIOGRAPH, generate_uid(entropy_srcs=["a test"])
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 3 if colour else 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * array.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(np.issubdtype(array.dtype, np.signedinteger))
    if colour:
        dataset.PlanarConfiguration = 0
    elif shape[0] > 1:
        dataset.NumberOfFrames = shape[0]
    dataset.PixelData = array.astype(array.dtype.newbyteorder("<")).tobytes() + b"\0" * (array.nbytes % 2)
    dataset["PixelData"].VR = "OB" if array.itemsize == 1 else "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def table(values, *, first: int, bits: int, signed: bool = False) -> Sequence:
    """Return the sequence of a modality or VOI look-up table."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", np.asarray(values, "<u2").tobytes())
    return Sequence([item])


def save(path: Path, dataset: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, array, *, compression=None, bits: int = 16, **options) -> Path:
    """Write `array` as `dicom` makes it, compressed by a transfer syntax."""
    dataset = dicom(array, bits=bits, **options)
    if compression in COMPRESSIONS:
        dataset.compress(compression, generate_instance_uid=False)
    elif compression in JPEGS:
        frames = array if array.ndim == 3 and "RGB" not in dataset.PhotometricInterpretation else [array]
        # A codestream has no sign: those of 12 bits are cut to them, as a scanner does.
        unsigned = [
            frame.view(f"u{frame.itemsize}") & np.array(2**bits - 1, f"u{frame.itemsize}") for frame in frames
        ]
        coded = [imagecodecs.jpeg8_encode(frame, **JPEGS[compression]) for frame in unsigned]
        dataset.PixelData = encapsulate(coded)
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = compression
    elif compression is not None:
        dataset.file_meta.TransferSyntaxUID = compression
    return save(path, dataset)
