import csv
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from chanscale.data.phantoms import CLASSES, _schedule, draw_phantom, write_phantoms
from chanscale.errors import ConfigError, DataError

GROUP = re.compile(r"^(\d+)_")


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("size", [64, 101])
def test_phantom_is_square_grey_and_uses_the_grey_range(size: int) -> None:
    phantom = draw_phantom(0, size=size, label=1, patient=3)
    assert phantom.image.shape == (size, size)
    assert phantom.image.dtype == np.uint8
    assert (phantom.label, phantom.patient) == (1, 3)
    assert np.ptp(phantom.image) > 150


def test_same_arguments_give_the_same_pixels() -> None:
    first, second = (draw_phantom(5, size=64, label=1, patient=2, image=1) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    assert first.boxes == second.boxes


@pytest.mark.parametrize("change", [{"seed": 1}, {"patient": 1}, {"image": 1}])
def test_seed_patient_and_image_each_change_the_pixels(change: dict[str, int]) -> None:
    usual = {"seed": 0, "patient": 0, "image": 0}
    first, second = (draw_phantom(**options, size=64, label=0) for options in (usual, usual | change))
    assert np.mean(first.image != second.image) > 0.5


def test_label_changes_the_inside_of_the_boxes_and_little_else() -> None:
    for patient in range(6):
        well, ill = (draw_phantom(0, size=96, label=label, patient=patient) for label in (0, 1))
        inside = np.zeros((96, 96), bool)
        for x, y, width, height in ill.boxes:
            inside[int(y) : int(y + height), int(x) : int(x + width)] = True
        whiter = ill.image.astype(float) - well.image
        assert whiter[inside].mean() > 8
        assert np.abs(whiter[~inside]).mean() < 0.2 * whiter[inside].mean()


def test_one_to_three_boxes_lie_inside_the_image() -> None:
    for patient in range(20):
        boxes = draw_phantom(1, size=64, label=1, patient=patient).boxes
        assert 1 <= len(boxes) <= 3
        for x, y, width, height in boxes:
            assert 0 <= x < x + width <= 64
            assert 0 <= y < y + height <= 64
            assert min(width, height) >= 2
    assert draw_phantom(1, size=64, label=0).boxes == ()


def test_boxes_lie_on_lungs_which_are_darker_than_the_mediastinum() -> None:
    for patient in range(12):
        well, ill = (draw_phantom(7, size=64, label=label, patient=patient) for label in (0, 1))
        mediastinum = np.median(well.image[20:50, 29:35])
        for x, y, width, height in ill.boxes:
            covered = well.image[int(y) : int(y + height), int(x) : int(x + width)]
            assert np.median(covered) < 0.7 * mediastinum
            assert 0.1 < (x + width / 2) / 64 < 0.9
            assert 0.15 < (y + height / 2) / 64 < 0.85


def test_boxes_grow_with_the_image() -> None:
    for patient in range(5):
        small, large = (draw_phantom(2, size=size, label=1, patient=patient).boxes for size in (96, 192))
        # Each of a box's edges is rounded to a pixel, and a ragged border may lose or gain a few.
        np.testing.assert_allclose(2 * np.array(small), large, atol=8)


def test_mean_grey_does_not_give_the_label_away() -> None:
    pairs = [
        draw_phantom(3, size=64, label=label, patient=patient) for patient in range(50) for label in (0, 1)
    ]
    area = roc_auc_score([pair.label for pair in pairs], [pair.image.mean() for pair in pairs])
    assert area < 0.65


def test_written_set_is_balanced_grouped_and_boxed(tmp_path: Path) -> None:
    out = write_phantoms(tmp_path / "deep" / "set", count=9, image_size=64, seed=0)
    names = {label: sorted(path.name for path in (out / label).iterdir()) for label in CLASSES}
    assert sorted(map(len, names.values())) == [4, 5]
    patients = {label: {GROUP.match(name)[1] for name in names[label]} for label in CLASSES}  # type: ignore[index]
    assert not patients["normal"] & patients["opacity"]
    with (out / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "x", "y", "width", "height"]
    assert {row["image"] for row in rows} == set(names["opacity"])
    with Image.open(out / "opacity" / names["opacity"][0]) as film:
        assert (film.mode, film.size) == ("L", (64, 64))


def test_small_set_is_the_beginning_of_a_large_one(tmp_path: Path) -> None:
    small, large = (
        files_below(write_phantoms(tmp_path / str(n), count=n, image_size=64, seed=4)) for n in (3, 6)
    )
    images = {name for name in small if name.endswith(".png")}
    assert len(images) == 3
    assert all(small[name] == large[name] for name in images)


def test_some_patients_have_two_films_and_each_has_one_label() -> None:
    rows = list(islice(_schedule(0), 200))
    assert len({(patient, image) for patient, image, _ in rows}) == 200
    assert len({(patient, label) for patient, _, label in rows}) == len({patient for patient, _, _ in rows})
    assert 110 < len({patient for patient, _, _ in rows}) < 190
    assert sum(label for _, _, label in rows) == 100


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_phantoms(tmp_path / "set", count=3, image_size=64, seed=0, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "set", count=4, image_size=64, seed=0, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"set exists already; remove it, or choose another"):
        write_phantoms(tmp_path / "set", count=4, image_size=64, seed=0)
    assert list((tmp_path / "set").iterdir()) == []


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write phantoms to .*; choose another folder"):
        write_phantoms(tmp_path / "file" / "set", count=4, image_size=64, seed=0)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"64 to 1024 pixels\. Got 32"):
        draw_phantom(0, size=32, label=0)
    with pytest.raises(ConfigError, match="label must be 0"):
        draw_phantom(0, size=64, label=2)
    with pytest.raises(ConfigError, match="Got count=1"):
        write_phantoms(tmp_path / "set", count=1, image_size=64, seed=0)
    with pytest.raises(ConfigError, match="seed must be 0 or more"):
        draw_phantom(-1, size=64, label=0)
