from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chanscale.data import BatchLoader, DecodedImages, decode_images, open_images
from chanscale.data import loading as loading_module
from chanscale.errors import ConfigError, DataError, UnreadableImageError

SIZE = 6


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey images of two classes, in 8 and 16 bits."""
    rng = np.random.default_rng(0)
    for i in range(5):
        save(tmp_path / "a" / f"{i}.png", rng.integers(0, 256, (9, 7), np.uint8))
        save(tmp_path / "b" / f"{i}.png", rng.integers(0, 65536, (SIZE, SIZE), np.uint16))
    return tmp_path


def decode(folder: Path, **options: object) -> DecodedImages:
    return decode_images(open_images(folder), image_size=SIZE, **options)  # type: ignore[arg-type]


def orders(loader: BatchLoader, epoch: int) -> list[list[int]]:
    return [batch.indices.tolist() for batch in loader.epoch(epoch)]


def test_images_are_float32_from_0_to_1_with_label_and_index(folder: Path) -> None:
    dataset = decode(folder)
    image, label, index = dataset[7]
    with Image.open(folder / "b" / "2.png") as file:
        expected = np.asarray(file).astype(np.float32) / np.float32(65535)
    assert (image.dtype, image.shape, label, index) == (torch.float32, (1, SIZE, SIZE), 1, 7)
    np.testing.assert_array_equal(image[0].numpy(), expected)
    assert (len(dataset), dataset.channels, dataset.cached) == (10, 1, True)


def test_an_8_bit_value_is_exactly_its_255th(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        save(tmp_path / name, levels)
    image, _, _ = decode_images(open_images(tmp_path), image_size=16)[0]
    assert torch.equal(image[0], torch.from_numpy(levels).float() / 255)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_cached_equals_on_demand(folder: Path, workers: int) -> None:
    cached = decode(folder, workers=workers)
    on_demand = decode(folder, workers=workers, cache_bytes=0)
    assert (cached.cached, on_demand.cached) == (True, False)
    for dataset in (cached, on_demand):
        images, labels = dataset.batch(range(10))
        assert images.shape == (10, 1, SIZE, SIZE)
        assert labels.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(cached.batch([3, 8, 3])[0], on_demand.batch(np.array([3, 8, 3]))[0])
    assert torch.equal(cached[4][0], on_demand[4][0])


def test_the_cache_is_used_up_to_its_last_byte(folder: Path) -> None:
    needed = 10 * SIZE * SIZE * 2
    assert decode(folder, cache_bytes=needed).cached
    assert not decode(folder, cache_bytes=needed - 1).cached


def test_the_cache_takes_a_quarter_of_what_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 10 * SIZE * SIZE * 2
    for free, cached in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(loading_module, "free_memory", lambda free=free: free)
        assert decode(folder).cached == cached


def test_cached_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str | None] = []
    original = loading_module.read_image
    monkeypatch.setattr(
        loading_module,
        "read_image",
        lambda source, *, size, name: read.append(name) or original(source, size=size, name=name),
    )
    dataset = decode(folder, skip_bad=True)
    dataset.batch(range(10))
    assert len(read) == len(set(read)) == 10


def test_a_batch_is_the_callers_own(folder: Path) -> None:
    dataset = decode(folder)
    before = dataset[0][0].clone()
    dataset.batch([0])[0].zero_()
    dataset.batch(range(10))[1].zero_()
    assert torch.equal(dataset[0][0], before)
    assert dataset[9][1] == 1


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_one_rgb_image_makes_all_three_channels(folder: Path, cache_bytes: int | None) -> None:
    grey = decode(folder)
    save(folder / "b" / "5.png", np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    mixed = decode(folder, cache_bytes=cache_bytes)
    assert mixed.channels == 3
    assert torch.equal(mixed[2][0], grey[2][0].expand(3, -1, -1))
    assert not torch.equal(mixed[10][0][0], mixed[10][0][1])


def test_grey_equals_rgb_of_equal_planes(tmp_path: Path) -> None:
    plane = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    for label in "ab":
        save(tmp_path / label / "grey.png", plane)
        save(tmp_path / label / "rgb.png", np.stack([plane] * 3, axis=-1))
    dataset = decode(tmp_path)
    assert torch.equal(dataset[0][0], dataset[1][0])


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_bad_images_are_skipped_counted_and_named(folder: Path, cache_bytes: int | None) -> None:
    whole = decode(folder)
    (folder / "a" / "1.png").write_bytes(b"")
    (folder / "b" / "4.png").write_text("text")
    done: list[tuple[int, int]] = []
    dataset = decode(
        folder, skip_bad=True, cache_bytes=cache_bytes, progress=lambda *counts: done.append(counts)
    )
    assert dataset.images.skipped == ("a/1.png", "b/4.png")
    assert dataset.cached == (cache_bytes is None)
    assert len(dataset) == 8
    kept = [0, 2, 3, 4, 5, 6, 7, 8]
    for ours, theirs in zip(dataset.batch(range(8)), whole.batch(kept), strict=True):
        assert torch.equal(ours, theirs)
    assert done == [(i, 10) for i in range(1, 11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_with_its_name(folder: Path, workers: int) -> None:
    (folder / "a" / "3.png").write_bytes(b"")
    (folder / "b" / "0.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"a/3\.png.*0 bytes.*skip_bad") as caught:
        decode(folder, workers=workers)
    assert "\n" not in str(caught.value)
    on_demand = decode(folder, workers=workers, cache_bytes=0)
    with pytest.raises(UnreadableImageError, match=r"a/3\.png"):
        list(BatchLoader(on_demand, range(10), batch_size=2, workers=workers).epoch())


def test_nothing_but_bad_images_is_an_error(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 10 images .* is readable; the first is a/0\.png"):
        decode(folder, skip_bad=True)


def test_npz_arrays_are_decoded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels)
    dataset = decode(tmp_path / "a.npz")
    assert torch.equal(dataset[3][0], torch.from_numpy(pixels[3]).permute(2, 0, 1).float() / 255)


def test_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    dataset = decode(folder)
    loader = BatchLoader(dataset, range(10), batch_size=3, shuffle=True, seed=5)
    first = [orders(loader, epoch) for epoch in range(3)]
    resumed = BatchLoader(dataset, range(10), batch_size=3, shuffle=True, seed=5)
    assert orders(resumed, 2) == first[2]
    assert first[0] != first[1]
    other = BatchLoader(dataset, range(10), batch_size=3, shuffle=True, seed=6)
    assert orders(other, 0) != first[0]
    on_demand = BatchLoader(
        decode(folder, cache_bytes=0), range(10), batch_size=3, shuffle=True, seed=5, workers=3
    )
    assert orders(on_demand, 1) == first[1]


def test_batches_hold_the_images_of_their_indices(folder: Path) -> None:
    for dataset in (decode(folder), decode(folder, cache_bytes=0)):
        for batch in BatchLoader(dataset, [9, 2, 4], batch_size=2, shuffle=True).epoch(1):
            images, labels = dataset.batch(batch.indices.numpy())
            assert torch.equal(batch.images, images)
            assert torch.equal(batch.labels, labels)


def test_without_shuffling_the_order_is_the_given_one(folder: Path) -> None:
    loader = BatchLoader(decode(folder), [9, 2, 4], batch_size=2)
    assert orders(loader, 0) == orders(loader, 1) == [[9, 2], [4]]


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 3]), (8, [3, 3, 2]), (1, [1])])
def test_a_last_image_alone_is_dropped_in_training_only(folder: Path, count: int, sizes: list[int]) -> None:
    dataset = decode(folder)
    training = BatchLoader(dataset, range(count), batch_size=3, shuffle=True)
    assert [len(batch.labels) for batch in training.epoch(0)] == sizes
    assert len(training) == len(sizes)
    plain = BatchLoader(dataset, range(count), batch_size=3)
    assert sum(len(batch.labels) for batch in plain.epoch()) == count


def test_an_epoch_may_be_left_early(folder: Path) -> None:
    loader = BatchLoader(decode(folder, cache_bytes=0), range(10), batch_size=1, workers=2)
    batches: Iterator[loading_module.Batch] = loader.epoch()
    assert next(batches).indices.tolist() == [0]
    batches.close()  # type: ignore[attr-defined]
    assert orders(loader, 0) == [[i] for i in range(10)]


def test_a_batch_size_of_0_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        BatchLoader(decode(folder), range(10), batch_size=0)


def test_real_images_are_decoded_in_full(nih_opacity: Path) -> None:
    images = open_images(nih_opacity)
    dataset = decode_images(images, image_size=32)
    batch, labels = dataset.batch(range(0, len(images), 20))
    assert dataset.cached
    assert dataset.channels == 1
    assert 0.3 < float(batch.mean()) < 0.7
    assert 0 < int(labels.sum()) < len(labels)
