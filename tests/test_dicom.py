"""DICOM to pixels: against the standard's formulas, pydicom's own rendering, and files that are broken."""

import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
)

from chanscale.data import dicom as reader
from chanscale.data import read_image
from chanscale.data.dicom_codecs import find_size
from chanscale.data.dicom_levels import apply_window
from chanscale.data.images import count_channels
from chanscale.errors import UnreadableImageError
from dicom_files import COMPRESSIONS, dicom, save, table, write

GREY = [
    "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm", "CT_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm",
    "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "liver_1frame.dcm", "examples_overlay.dcm",
    "image_dfl.dcm",
]  # fmt: skip
COLOUR = [
    "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_small_odd.dcm",
    "SC_rgb_dcmtk_+eb+cy+n2.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_rle_16bit.dcm", "examples_ybr_color.dcm",
]  # fmt: skip
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP16 = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)  # an encoder of JPEG 2000 wants 32 at least


def own(name: str) -> Path:
    """Return a file of pydicom's package; those that it would download are not used."""
    found = get_testdata_file(name, download=False)
    assert found is not None
    return Path(found)


def read(path: Path):
    return read_image(path, size=None)


def message(path: Path) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


def read_or_refusal(path: Path):
    """Return the pixels, or what is said instead."""
    try:
        return read(path)
    except UnreadableImageError as error:
        return str(error)


def limits(dataset) -> tuple[float, float]:
    """Return the values that the bits of a file allow, in the units of the modality."""
    bits, slope = dataset.BitsStored, float(dataset.get("RescaleSlope", 1))
    low = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    shift = float(dataset.get("RescaleIntercept", 0))
    return slope * low + shift, slope * (low + 2**bits - 1) + shift


# --- against pydicom


@pytest.mark.parametrize("name", GREY)
def test_grey_files_look_as_pydicom_renders_them(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(own(name))
        rendered = apply_voi_lut(apply_modality_lut(pixel_array(dataset, index=0), dataset), dataset)
        low, high = limits(dataset)
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    wanted = np.clip(65535 * (rendered.astype(float) - low) / (high - low), 0, 65535)
    [pixels] = read(own(name))
    assert np.abs(pixels - (65535 - wanted if inverted else wanted)).max() <= 0.51
    assert pixels.max() > pixels.min()
    assert count_channels(own(name)) == 1


@pytest.mark.parametrize("name", COLOUR)
def test_colour_files_have_the_colours_that_pydicom_finds(name):
    dataset = dcmread(own(name))
    scale = 65535 / (2**dataset.BitsStored - 1)
    wanted = pixel_array(dataset, index=0) * scale
    assert np.abs(np.moveaxis(read(own(name)), 0, -1) - wanted).max() <= 0.51
    assert count_channels(own(name)) == 3


def test_a_palette_becomes_its_colours(tmp_path):
    dataset = dicom(RAMP, bits=8, photometric="PALETTE COLOR")
    colours = {"Red": np.arange(256), "Green": 255 - np.arange(256), "Blue": np.full(256, 7)}
    for name, values in colours.items():
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 8])
        dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", values.astype(np.uint8).tobytes())
    pixels = read(save(tmp_path / "a.dcm", dataset))
    assert np.array_equal(pixels, np.stack([values[RAMP] * 257 for values in colours.values()]))
    assert count_channels(tmp_path / "a.dcm") == 3
    assert (
        read(own("examples_palette.dcm")).max() == 255 * 256
    )  # entries of 16 bits that end below full white


# --- the chain of grey levels


def shown(value: float, *, centre: float, width: float, function: str) -> float:
    """Return the share of white of one value, as PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2 write it."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.float64(min(-4 * (value - centre) / width, 700))))
    if function == "LINEAR":
        if value <= centre - 0.5 - (width - 1) / 2:
            return 0
        return 1 if value > centre - 0.5 + (width - 1) / 2 else (value - (centre - 0.5)) / (width - 1) + 0.5
    if value <= centre - width / 2:
        return 0
    return 1 if value > centre + width / 2 else (value - centre) / width + 0.5


@given(
    bits=st.integers(8, 16),
    signed=st.booleans(),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
    slope=st.sampled_from([1.0, -1.0, 0.5, 2.25]),
    intercept=st.sampled_from([0.0, -1024.0, 12.5]),
    centre=st.floats(-2000, 2000).map(lambda x: round(x, 2)),
    width=st.floats(1, 4000).map(lambda x: round(x, 2)),
    seed=st.integers(0, 99),
)
@example(12, True, "MONOCHROME1", "LINEAR", 1.0, 0.0, 0.0, 1.0, 0)
def test_every_chain_of_rescale_window_and_inversion_is_the_standards(
    tmp_path_factory, bits, signed, photometric, function, slope, intercept, centre, width, seed
):
    low = -(2 ** (bits - 1)) if signed else 0
    kind = f"{'' if signed else 'u'}int{8 if bits == 8 else 16}"
    stored = np.random.default_rng(seed).integers(low, low + 2**bits, (5, 6)).astype(kind)
    window = {} if function is None else {
        "WindowCenter": [centre, 7], "WindowWidth": [width, 70], "VOILUTFunction": function,
    }  # fmt: skip
    path = write(
        tmp_path_factory.mktemp("chain") / "a.dcm", stored, bits=bits, photometric=photometric,
        RescaleSlope=slope, RescaleIntercept=intercept, **window,
    )  # fmt: skip
    values = stored * slope + intercept
    if function is None:
        ends = sorted((low * slope + intercept, (low + 2**bits - 1) * slope + intercept))
        shares = (values - ends[0]) / (ends[1] - ends[0])
    else:
        one = np.vectorize(lambda x: shown(x, centre=centre, width=width, function=function), otypes=[float])
        shares = one(values)
    wanted = 65535 * (1 - shares if photometric == "MONOCHROME1" else shares)
    [pixels] = read(path)
    assert np.abs(pixels - wanted).max() <= 0.51


def test_an_8_bit_image_without_a_window_is_the_same_as_in_a_png(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert np.array_equal(read(write(tmp_path / "a.dcm", RAMP, bits=8)), read(tmp_path / "a.png"))


def test_a_12_bit_window_keeps_all_its_grey_levels(tmp_path):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = write(tmp_path / "a.dcm", stored, bits=12, WindowCenter=2048, WindowWidth=4096)
    assert len(np.unique(read(path))) == 4096
    assert (read(path).min(), read(path).max()) == (0, 65535)


def test_the_window_moves_with_the_rescale(tmp_path):
    plain = write(tmp_path / "a.dcm", RAMP16, WindowCenter=30000, WindowWidth=9000)
    moved = write(tmp_path / "b.dcm", RAMP16, WindowCenter=59000, WindowWidth=17999, RescaleSlope=2,
                  RescaleIntercept=-1000)  # fmt: skip
    assert np.abs(read(plain)[0].astype(int) - read(moved)[0]).max() <= 4  # half a level of 9000


def test_a_modality_table_comes_before_the_voi_table_and_ends_count_beyond(tmp_path):
    stored = np.array([[0, 9, 10, 11], [12, 13, 200, 255]], np.uint8)
    path = write(
        tmp_path / "a.dcm", stored, bits=8,
        ModalityLUTSequence=table([100, 101, 102, 103], first=10, bits=16),
        VOILUTSequence=table([5, 1000, 4095], first=101, bits=12),
        WindowCenter=1, WindowWidth=2, RescaleSlope=3, RescaleIntercept=4,
    )  # fmt: skip
    wanted = np.array([[5, 5, 5, 5], [1000, 4095, 4095, 4095]])
    wanted[0, 3] = 5  # 101, the first of the second table
    assert np.array_equal(read(path)[0], np.rint(wanted * 65535 / 4095))


def test_a_table_may_start_below_0_whichever_way_that_is_written(tmp_path):
    stored = np.array([[-3, -2, -1, 0]], np.int16)
    for signed, first in ((True, -2), (False, 65534)):
        path = write(
            tmp_path / "a.dcm",
            stored,
            VOILUTSequence=table([9, 99, 999], first=first, bits=10, signed=signed),
        )
        assert np.array_equal(read(path)[0], np.rint(np.array([[9, 9, 99, 999]]) * 65535 / 1023))


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [("MONOCHROME1", None, True), ("MONOCHROME1", "INVERSE", True), ("MONOCHROME1", "IDENTITY", True),
     ("MONOCHROME2", None, False), ("MONOCHROME2", "INVERSE", True), ("MONOCHROME2", "IDENTITY", False)],
)  # fmt: skip
def test_white_and_black_change_places_at_most_once(tmp_path, photometric, shape, inverted):
    tags = {} if shape is None else {"PresentationLUTShape": shape}
    [pixels] = read(write(tmp_path / "a.dcm", RAMP, bits=8, photometric=photometric, **tags))
    assert np.array_equal(pixels, (255 - RAMP if inverted else RAMP) * np.uint16(257))


@pytest.mark.parametrize(
    "tags",
    [{"WindowCenter": 9}, {"WindowWidth": 9}, {"WindowCenter": 9, "WindowWidth": 0}, {"RescaleSlope": 0},
     {"WindowCenter": "", "WindowWidth": ""}, {"PixelRepresentation": None}, {"HighBit": None},
     {"SamplesPerPixel": None}, {"PhotometricInterpretation": None}, {"BitsStored": None},
     {"VOILUTFunction": "SIGMOID"}],
)  # fmt: skip
def test_what_is_missing_or_no_window_falls_back_to_the_full_range(tmp_path, tags):
    assert np.array_equal(read(write(tmp_path / "a.dcm", RAMP, bits=8, **tags))[0], RAMP * np.uint16(257))


def test_unused_bits_may_hold_anything(tmp_path):
    stored = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 64) | 0xF000  # an overlay in the upper four
    assert np.array_equal(read(write(tmp_path / "a.dcm", stored, bits=12))[0],
                          np.rint((stored & 0xFFF) * (65535 / 4095)))  # fmt: skip


def test_a_window_of_width_one_is_a_step():
    values = np.array([4.0, 4.5, 4.6, 5.0])
    assert apply_window(values, centre=5, width=1).tolist() == [0, 0, 1, 1]


# --- compressions and encodings


@pytest.mark.parametrize("compression", [*COMPRESSIONS, JPEGLosslessSV1, ImplicitVRLittleEndian,
                                         DeflatedExplicitVRLittleEndian])  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "bits"), [("uint8", 8), ("uint16", 12), ("uint16", 16), ("int16", 12), ("int16", 16)]
)
def test_lossless_compression_changes_nothing(tmp_path, compression, kind, bits):
    low = -(2 ** (bits - 1)) if kind == "int16" else 0
    stored = np.random.default_rng(0).integers(low, low + 2**bits, (40, 48)).astype(kind)
    plain = read(write(tmp_path / "plain.dcm", stored, bits=bits))
    assert np.array_equal(read(write(tmp_path / "a.dcm", stored, bits=bits, compression=compression)), plain)
    assert len(np.unique(plain)) > 100


@pytest.mark.parametrize("compression", [*COMPRESSIONS, JPEGLosslessSV1])
def test_colours_are_kept_through_lossless_compression(tmp_path, compression):
    colours = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    path = write(tmp_path / "a.dcm", colours, bits=8, photometric="RGB", compression=compression)
    assert np.array_equal(np.moveaxis(read(path), 0, -1), colours * np.uint16(257))


def test_jpeg_of_12_bits_is_close(tmp_path):
    stored = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16) * 32
    path = write(tmp_path / "a.dcm", stored, bits=12, compression=JPEGExtended12Bit)
    assert np.abs(read(path)[0] - stored * (65535 / 4095)).max() < 20 * 16


def test_big_endian_and_headless_files_are_read(tmp_path):
    dataset = dcmread(own("MR_small_bigendian.dcm"))
    assert dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    headless = dicom(RAMP, bits=8)
    del headless.file_meta
    headless.save_as(tmp_path / "a.ima", implicit_vr=True, little_endian=True)
    assert (tmp_path / "a.ima").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read(tmp_path / "a.ima")[0], RAMP * np.uint16(257))


# --- frames


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_each_frame_is_read_on_its_own(tmp_path, compression):
    stack = np.stack([RAMP16, RAMP16[::-1], RAMP16.T])
    path = write(tmp_path / "a.dcm", stack, compression=compression)
    for number, frame in enumerate(stack, start=1):
        assert np.array_equal(read_image(reader.Frame(path, number), size=None)[0], frame)
    assert np.array_equal(read(path)[0], stack[0])
    with pytest.raises(UnreadableImageError, match=r"a\.dcm#4: wanted frame 4, got a file of 3"):
        read_image(reader.Frame(path, 4), size=None)


def test_a_frame_has_the_window_of_its_functional_group(tmp_path):
    def group(**tags) -> Dataset:
        item, macro = Dataset(), Dataset()
        for keyword, value in tags.items():
            setattr(macro, keyword, value)
        name = "PixelValueTransformationSequence" if "RescaleSlope" in tags else "FrameVOILUTSequence"
        setattr(item, name, Sequence([macro]))
        return item

    path = write(
        tmp_path / "a.dcm", np.stack([RAMP16, RAMP16]),
        SharedFunctionalGroupsSequence=Sequence([group(RescaleSlope=2, RescaleIntercept=0)]),
        PerFrameFunctionalGroupsSequence=Sequence(
            [group(WindowCenter=50, WindowWidth=100), group(WindowCenter=65536, WindowWidth=131072)]
        ),
    )  # fmt: skip
    first, second = (read_image(reader.Frame(path, number), size=None)[0] for number in (1, 2))
    assert sorted(set(first.ravel().tolist())) == [0, 65535]
    assert np.abs(second - RAMP16.astype(float)).max() <= 1


# --- what cannot be used


@pytest.mark.parametrize(
    ("options", "said"),
    [({"Rows": None}, "got a header without Rows"), ({"BitsStored": 32}, "got 32 bits"),
     ({"HighBit": 11}, "got 8 bits of which the highest is bit 11, not 7"),
     ({"PixelData": None}, "got a DICOM file without pixels"), ({"SamplesPerPixel": 2}, "2 channels of another kind"),
     ({"PhotometricInterpretation": "HSV"}, "of another kind"), ({"SamplesPerPixel": 3}, "3 channels of another kind"),
     ({"NumberOfFrames": 9}, "cannot be decoded"),
     ({"Columns": 60000, "Rows": 60000}, "60000 x 60000 in 1 frame: a decompression bomb"),
     ({"NumberOfFrames": 2_000_000}, "16 x 16 in 2000000 frames: a decompression bomb"),
     ({"WindowCenter": 1, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "LINEAR, LINEAR_EXACT, SIGMOID, got another"),
     ({"VOILUTSequence": Sequence([Dataset()])}, "cannot be decoded (AttributeError)")],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(tmp_path, options, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(tmp_path / "a.dcm", RAMP, bits=8, **options)
    assert said in message(path)
    assert count_channels(path) in (1, 3)


def test_a_file_that_names_frames_without_end_is_one_image_of_a_set(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, bits=8, NumberOfFrames=2_000_000_000)
    header = reader.read_header(path)
    assert header is not None
    assert header.frames == 1


def test_a_frame_that_is_larger_than_its_header_says_is_not_unpacked(tmp_path):
    large = dicom(np.zeros((64, 64), np.uint8), bits=8)
    large.compress(JPEG2000Lossless, generate_instance_uid=False)
    large.Rows = large.Columns = 8
    assert "wanted 8 x 8 pixels, as the header says, got 64 x 64" in message(save(tmp_path / "a.dcm", large))


def test_the_size_of_a_codestream_is_found(tmp_path):
    lossless = dcmread(write(tmp_path / "a.dcm", RAMP[:9], bits=8, compression=JPEGLosslessSV1))
    assert find_size(bytes(lossless.PixelData[20:])) == (9, 16)
    assert find_size(b"\xff\xd8\xff\xe0\x00\x04ab\xff\xff\xf7\x00\x0b\x08\x00\x05\x00\x06\x01") == (5, 6)
    assert find_size(b"\xff\xd8\xff\xd9") is find_size(b"") is find_size(encapsulate([b"x" * 8])) is None


def test_what_is_deflated_does_not_grow_without_bounds(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm", RAMP16, compression=DeflatedExplicitVRLittleEndian)
    assert read(path).shape == (1, 32, 32)
    monkeypatch.setattr(reader, "_MAX_INFLATED", 100)
    assert "got more, deflated: a decompression bomb" in message(path)


def test_a_deflated_file_is_listed_without_growing_without_bounds(tmp_path, monkeypatch):
    pixels = np.zeros((2048, 2048), np.uint8)
    path = write(
        tmp_path / "a.dcm", pixels, bits=8, compression=DeflatedExplicitVRLittleEndian, PatientID="P1"
    )
    assert path.stat().st_size < 10_000
    assert reader.read_header(path) == reader.Header("P1", 1, 1, 2048, 2048)
    # Three chunks of 1 MiB are held at the most where 4 MiB are refused; pydicom would hold them all.
    monkeypatch.setattr(reader, "_MAX_INFLATED", 2**21)
    tracemalloc.start()
    try:
        assert reader.read_header(path) is None
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 20, b"\x08\x00" + b"\xff" * 400,
                                     b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 300])  # fmt: skip
def test_other_files_with_its_suffix_are_one_line(tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    assert "wanted a" in message(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    "compression", [None, *COMPRESSIONS, JPEGLosslessSV1, DeflatedExplicitVRLittleEndian]
)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path_factory, compression, data):
    path = tmp_path_factory.mktemp("damaged") / "a.dcm"
    whole = bytearray(
        write(path, RAMP16, compression=compression, WindowCenter=9000, WindowWidth=9000).read_bytes()
    )
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if whole:
            whole[data.draw(st.integers(0, min(len(whole), 900) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    outcome = read_or_refusal(path)
    assert "\n" not in outcome if isinstance(outcome, str) else outcome.dtype == np.uint16
    assert count_channels(path) in (1, 3)
