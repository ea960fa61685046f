import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from chanscale.data import read_image
from chanscale.data.images import count_channels
from chanscale.errors import UnreadableImageError

SIZE = 8
GREY8 = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 4
GREY16 = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 1031 + 3
RGB8 = np.stack([GREY8, GREY8[::-1], GREY8.T], axis=-1)
RGB16 = np.stack([GREY16, GREY16[::-1], GREY16.T], axis=-1)


def write_png(
    path: Path, samples: NDArray[np.generic], colour_type: int, extra: bytes = b"", kind: bytes = b"tRNS"
) -> Path:
    """Write a 16-bit PNG of any colour type, which Pillow cannot."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if extra:
        chunks.insert(1, (kind, extra))
    packed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


def save(path: Path, array: NDArray[np.generic], **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


def read(source: Path | NDArray[np.generic]) -> NDArray[np.uint16]:
    return read_image(source, size=SIZE)


def message(source: Path | NDArray[np.generic]) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        read(source)
    text = str(caught.value)
    assert "\n" not in text
    assert str(source) in text or isinstance(source, np.ndarray)
    return text


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_bit_grey_becomes_exactly_257_times(tmp_path: Path, suffix: str) -> None:
    pixels = read(save(tmp_path / f"a.{suffix}", GREY8))
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, GREY8[None].astype(np.uint16) * 257)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_bit_rgb_becomes_exactly_257_times(tmp_path: Path, suffix: str) -> None:
    pixels = read(save(tmp_path / f"a.{suffix}", RGB8))
    np.testing.assert_array_equal(pixels, RGB8.transpose(2, 0, 1).astype(np.uint16) * 257)


def test_16_bit_grey_png_is_kept(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", GREY16)), GREY16[None])


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 1), (6, 3)])
def test_16_bit_colour_png_is_kept_and_opaque_alpha_changes_nothing(
    tmp_path: Path, colour_type: int, channels: int
) -> None:
    samples = RGB16[..., :channels]
    if colour_type != 2:
        samples = np.concatenate([samples, np.full((SIZE, SIZE, 1), 65535, np.uint16)], axis=-1)
    path = write_png(tmp_path / "a.png", samples, colour_type)
    np.testing.assert_array_equal(read(path), RGB16[..., :channels].transpose(2, 0, 1))
    assert count_channels(path) == channels


@pytest.mark.parametrize(
    "options", [{}, {"byteorder": ">"}, {"compression": "zlib"}, {"photometric": "minisblack"}]
)
def test_16_bit_grey_tiff_is_kept(tmp_path: Path, options: dict[str, str]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY16, **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), GREY16[None])


@pytest.mark.parametrize("array", [GREY8, GREY16])
def test_white_is_zero_is_inverted(tmp_path: Path, array: NDArray[np.generic]) -> None:
    tifffile.imwrite(tmp_path / "black.tif", array, photometric="minisblack")
    tifffile.imwrite(tmp_path / "white.tif", array, photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "white.tif"), 65535 - read(tmp_path / "black.tif"))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_16_bit_rgb_tiff_is_kept(tmp_path: Path, planar: str) -> None:
    planes = RGB16 if planar == "contig" else RGB16.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), RGB16.transpose(2, 0, 1))


@pytest.mark.parametrize("options", [{"compression": "lzw"}, {"compression": "lzw", "predictor": True}])
def test_compressed_16_bit_rgb_tiff_is_kept(tmp_path: Path, options: dict[str, object]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB16, photometric="rgb", **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), RGB16.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_alike_with_8_and_16_bits(tmp_path: Path, orientation: int) -> None:
    tag = [(274, "H", 1, orientation, True)]
    exif = Image.Exif()
    exif[274] = orientation
    expected = read(save(tmp_path / "a.png", RGB8, exif=exif))
    tifffile.imwrite(tmp_path / "8.tif", RGB8, photometric="rgb", extratags=tag)
    tifffile.imwrite(tmp_path / "16.tif", RGB8.astype(np.uint16) * 257, photometric="rgb", extratags=tag)
    tifffile.imwrite(tmp_path / "grey.tif", RGB8[..., 0].astype(np.uint16) * 257, extratags=tag)
    assert (orientation == 1) == np.array_equal(expected, RGB8.transpose(2, 0, 1).astype(np.uint16) * 257)
    np.testing.assert_array_equal(read(tmp_path / "8.tif"), expected)
    np.testing.assert_array_equal(read(tmp_path / "16.tif"), expected)
    np.testing.assert_array_equal(read(tmp_path / "grey.tif"), expected[:1])


def test_orientation_of_a_16_bit_png_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    np.testing.assert_array_equal(
        read(save(tmp_path / "a.png", GREY16, exif=exif)), np.rot90(GREY16, -1)[None]
    )
    turned = write_png(tmp_path / "b.png", RGB16, 2, exif.tobytes().removeprefix(b"Exif\0\0"), kind=b"eXIf")
    np.testing.assert_array_equal(read(turned), np.rot90(RGB16, -1).transpose(2, 0, 1))


def test_jpeg_is_read_as_grey_or_rgb(tmp_path: Path) -> None:
    grey = read(save(tmp_path / "a.jpg", GREY8, quality=100))
    rgb = read(save(tmp_path / "b.jpeg", np.stack([GREY8] * 3, axis=-1), quality=100))
    assert (grey.shape, rgb.shape) == ((1, SIZE, SIZE), (3, SIZE, SIZE))
    # One grey level of 255: what JPEG loses at its best quality.
    np.testing.assert_allclose(grey, GREY8[None].astype(float) * 257, atol=2 * 257)


def test_one_bit_and_palette_are_converted(tmp_path: Path) -> None:
    black_white = save(tmp_path / "a.png", GREY8 > 100)
    palette = tmp_path / "b.png"
    Image.fromarray(RGB8).quantize(256).save(palette)
    np.testing.assert_array_equal(read(black_white), (GREY8 > 100)[None].astype(np.uint16) * 65535)
    np.testing.assert_array_equal(read(palette), RGB8.transpose(2, 0, 1).astype(np.uint16) * 257)


@pytest.mark.parametrize("array", [GREY8, RGB8])
def test_opaque_alpha_changes_nothing(tmp_path: Path, array: NDArray[np.uint8]) -> None:
    with_alpha = np.concatenate([np.atleast_3d(array), np.full((SIZE, SIZE, 1), 255, np.uint8)], axis=-1)
    expected = read(save(tmp_path / "plain.png", array))
    np.testing.assert_array_equal(read(save(tmp_path / "alpha.png", with_alpha)), expected)


def test_transparency_is_refused(tmp_path: Path) -> None:
    holed = np.concatenate([RGB8, np.full((SIZE, SIZE, 1), 254, np.uint8)], axis=-1)
    wide = np.concatenate([RGB16, np.full((SIZE, SIZE, 1), 254, np.uint16)], axis=-1)
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb", extrasamples=["unassalpha"])
    for path in (
        save(tmp_path / "a.png", holed),
        save(tmp_path / "b.png", GREY8, transparency=8),
        write_png(tmp_path / "c.png", GREY16, 0, struct.pack(">H", int(GREY16[0, 1]))),
        write_png(tmp_path / "d.png", RGB16, 2, RGB16[0, 1].astype(">u2").tobytes()),
        write_png(tmp_path / "e.png", RGB16[..., :2], 4),
        write_png(tmp_path / "f.png", wide, 6),
        tmp_path / "a.tif",
    ):
        assert "opaque" in message(path)


def test_a_transparent_grey_level_that_does_not_occur_is_no_matter(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", GREY16, 0, struct.pack(">H", 1))
    np.testing.assert_array_equal(read(path), GREY16[None])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, SIZE, 1), (SIZE, SIZE, 3)])
def test_arrays_are_read_like_files(dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)  # type: ignore[type-var]
    planes = np.atleast_3d(array).transpose(2, 0, 1).astype(np.uint16)
    np.testing.assert_array_equal(read(array), planes * (257 if dtype == np.uint8 else 1))


@given(level=st.integers(0, 65535), size=st.integers(1, 40))
def test_resizing_keeps_a_flat_image_flat(level: int, size: int) -> None:
    flat = np.full((17, 23), level, dtype=np.uint16)
    # One level of 65535: float32 weights of the filter add up to one only nearly.
    np.testing.assert_allclose(read_image(flat, size=size).astype(int), level, atol=1)


def test_resizing_is_antialiased_and_stays_in_range() -> None:
    stripes = np.tile(np.array([0, 65535], np.uint16), (64, 32))
    small = read_image(stripes, size=8)
    assert abs(small.astype(float).mean() - 32767.5) < 600
    assert small[:, :, 1:-1].std() < 1500  # without antialiasing: all 0, all 65535, or stripes
    edge = read_image(np.where(np.arange(64) < 32, 0, 65535).astype(np.uint16)[None].repeat(64, 0), size=48)
    assert (edge.min(), edge.max()) == (0, 65535)  # overshoot is clipped, and does not wrap around


def test_the_square_is_squashed_not_cropped() -> None:
    wide = np.zeros((10, 40), np.uint16)
    wide[:, 0] = wide[:, -1] = 65535
    small = read_image(wide, size=10)[0]
    assert small[:, 0].min() > 10000
    assert small[:, -1].min() > 10000


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((0, 4), np.uint8), "(0, 4)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "(2, 4, 4, 3)"),
    ],
)
def test_wrong_arrays_are_refused_with_what_came(array: NDArray[np.generic], got: str) -> None:
    assert got in message(array)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "truncated.png").write_bytes(whole.read_bytes()[:4000])
    (tmp_path / "header.png").write_bytes(whole.read_bytes()[:40])
    (tmp_path / "folder.png").mkdir()
    assert "0 bytes" in message(tmp_path / "empty.png")
    assert "something else" in message(tmp_path / "text.png")
    assert "cannot be decoded" in message(tmp_path / "truncated.png")
    assert "PNG" in message(tmp_path / "header.png")
    assert "directory" in message(tmp_path / "folder.png")
    assert "No such file" in message(tmp_path / "absent.png")


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_other_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    whole = save(tmp_path / f"whole.{suffix}", noise).read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: len(whole) // 2])
    message(tmp_path / f"a.{suffix}")


def test_a_truncated_16_bit_rgb_tiff_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB16, photometric="rgb")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-100])
    message(tmp_path / "a.tif")


def test_a_truncated_16_bit_rgb_png_is_refused(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", RGB16, 2)
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be decoded" in message(path)


@given(start=st.integers(0, 500), garbage=st.binary(min_size=1, max_size=60))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_damage_raises_nothing_but_unreadable(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, start: int, garbage: bytes
) -> None:
    path = save(tmp_path_factory.getbasetemp() / f"damaged.{suffix}", RGB8)
    data = bytearray(path.read_bytes())
    data[start : start + len(garbage)] = garbage
    path.write_bytes(data)
    with contextlib.suppress(UnreadableImageError):  # what may be raised; and what is read has the size
        assert read(path).shape[1:] == (SIZE, SIZE)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", GREY8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE - 1)
    assert "bomb" in message(path)


def test_what_is_neither_grey_nor_rgb_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB8).convert("CMYK").save(tmp_path / "cmyk.jpg")
    tifffile.imwrite(tmp_path / "float.tif", GREY8.astype(np.float32))
    tifffile.imwrite(tmp_path / "signed.tif", GREY8.astype(np.int16))
    tifffile.imwrite(tmp_path / "two.tif", RGB8[..., :2], photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "wide.tif", RGB16[..., :2], photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "cmyk.tif", np.dstack([RGB16, GREY16]), photometric="separated")
    Image.fromarray(GREY8).save(tmp_path / "gif.png", format="GIF")
    for name in ("cmyk.jpg", "float.tif", "signed.tif", "two.tif", "wide.tif", "cmyk.tif", "gif.png"):
        assert "grey or RGB" in message(tmp_path / name)


def test_several_pages_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY8] * 3), photometric="minisblack")
    assert "a file of 3" in message(tmp_path / "a.tif")


def test_a_photograph_with_a_preview_is_read_as_the_photograph(tmp_path: Path) -> None:
    preview = Image.fromarray(255 - RGB8).resize((4, 4))
    whole = Image.fromarray(RGB8)
    whole.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    whole.save(tmp_path / "b.jpg")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), read(tmp_path / "b.jpg"))


def test_channels_by_the_header_are_channels_by_decoding(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "rgb16.tif", RGB16, photometric="rgb")
    tifffile.imwrite(tmp_path / "grey16.tif", GREY16)
    palette = tmp_path / "palette.png"
    Image.fromarray(RGB8).quantize(8).save(palette)
    paths = [save(tmp_path / "grey.png", GREY8), save(tmp_path / "rgb.jpg", RGB8), palette]
    paths += [tmp_path / "rgb16.tif", tmp_path / "grey16.tif", save(tmp_path / "bw.png", GREY8 > 9)]
    for path in paths:
        assert count_channels(path) == len(read(path)), path


def test_a_real_radiograph_is_read_whole(nih_opacity: Path) -> None:
    path = min(nih_opacity.glob("pneumonia/*.png"))
    with Image.open(path) as image:
        expected = np.asarray(image)
    np.testing.assert_array_equal(read_image(path, size=256)[0], expected.astype(np.uint16) * 257)
