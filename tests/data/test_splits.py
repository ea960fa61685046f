import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chanscale.data import (
    ImageRecord,
    ImageSet,
    Splits,
    open_images,
    read_splits,
    read_training_names,
    split_images,
    suggest_group_pattern,
    write_splits,
)
from chanscale.errors import ArtifactError, SplitError


def make_set(
    labels: Sequence[int], groups: Sequence[object] = (), splits: Sequence[str | None] = ()
) -> ImageSet:
    names = [f"{label}/{i}.png" for i, label in enumerate(labels)]
    records = tuple(
        ImageRecord(name, label, str(group), split, path=Path(name))  # type: ignore[arg-type]
        for name, label, group, split in zip(
            names, labels, groups or names, splits or [None] * len(names), strict=True
        )
    )
    return ImageSet(Path("set"), tuple("abc"[: max(labels) + 1]), records)


def sides(splits: Splits) -> list[tuple[int, ...]]:
    return [splits.train, splits.validation, splits.test]


def message(images: ImageSet, validation: float = 0.2, test: float = 0.2) -> str:
    with pytest.raises(SplitError) as caught:
        split_images(images, validation=validation, test=test, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


labelled_groups = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), min_size=1, max_size=60)


@given(pairs=labelled_groups, seed=st.integers(0, 5), test=st.sampled_from([0.0, 0.2, 0.4]))
def test_no_group_on_two_sides_and_every_class_on_every_side(
    pairs: list[tuple[int, int]], seed: int, test: float
) -> None:
    images = make_set([label for label, _ in pairs], [group for _, group in pairs])
    try:
        splits = split_images(images, validation=0.2, test=test, seed=seed)
    except SplitError:
        return
    assert sorted(sum(sides(splits), ())) == list(range(len(images)))
    assert all(list(side) == sorted(side) for side in sides(splits))
    groups = [{images.records[i].group for i in side} for side in sides(splits)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for side in sides(splits) if test else sides(splits)[:2]:
        assert set(images.labels[list(side)]) == set(range(len(images.classes)))


@given(seed=st.integers(0, 20), sizes=st.lists(st.integers(1, 4), min_size=6, max_size=30))
def test_a_split_is_found_where_each_class_has_a_group_for_each_side(seed: int, sizes: list[int]) -> None:
    labels = [label for label in (0, 1) for size in sizes for _ in range(size)]
    groups = [(label, i) for label in (0, 1) for i, size in enumerate(sizes) for _ in range(size)]
    split_images(make_set(labels, groups), validation=0.15, test=0.2, seed=seed)


def test_shares_are_met_class_by_class_to_one_image() -> None:
    images = make_set([0] * 100 + [1] * 37 + [2] * 10)
    splits = split_images(images, validation=0.15, test=0.2, seed=3)
    counts = np.array([np.bincount(images.labels[list(side)], minlength=3) for side in sides(splits)])
    np.testing.assert_allclose(counts, np.outer([0.65, 0.15, 0.2], [100, 37, 10]), atol=1)


def test_patients_with_many_images_are_on_every_side() -> None:
    labels = [i % 2 for i in range(40) for _ in range(5)] + [i % 2 for i in range(200)]
    groups = [f"many{i}" for i in range(40) for _ in range(5)] + [f"one{i}" for i in range(200)]
    splits = split_images(make_set(labels, groups), validation=0.2, test=0.2, seed=0)
    shares = [np.mean([index < 200 for index in side]) for side in sides(splits)]
    # Half of the images are of patients with five. Filling the largest groups in first would give 0.83, 0, 0.
    np.testing.assert_allclose(shares, 0.5, atol=0.25)


def test_the_same_seed_gives_the_same_split_and_another_another() -> None:
    images = make_set([0, 1] * 30, [i // 3 for i in range(60)])
    one, same, other = (split_images(images, validation=0.2, test=0.2, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_share_of_0_leaves_the_side_empty() -> None:
    assert split_images(make_set([0, 1] * 5), validation=0.2, test=0, seed=0).test == ()


def test_each_class_gets_one_image_on_each_side_however_small_the_share() -> None:
    splits = split_images(make_set([0] * 3 + [1] * 3), validation=0.01, test=0.01, seed=0)
    assert [len(side) for side in sides(splits)] == [2, 2, 2]


def test_too_few_groups_are_an_error_with_advice() -> None:
    assert "no 'b', which has 2 groups" in message(make_set([0] * 9 + [1] * 2))
    assert "no 'b', which has 1 group " in message(make_set([0] * 9 + [1] * 9, [*range(9)] + ["p"] * 9))
    split_images(make_set([0] * 9 + [1] * 2), validation=0.2, test=0, seed=0)


def test_given_splits_are_honoured_whole() -> None:
    images = make_set([0, 1] * 3, splits=["train", "train", "validation", "validation", "test", "test"])
    splits = split_images(images, validation=0.4, test=0, seed=0)
    assert splits == Splits((0, 1), (2, 3), (4, 5))


def test_a_side_that_is_not_given_is_drawn_from_training_images() -> None:
    images = make_set([0, 1] * 15, splits=["train"] * 20 + ["test"] * 10)
    splits = split_images(images, validation=0.2, test=0.5, seed=0)
    assert splits.test == tuple(range(20, 30))
    assert len(splits.validation) == 4
    assert set(splits.validation) <= set(range(20))


def test_given_splits_that_cannot_be_honoured_are_errors() -> None:
    shared = make_set([0, 1] * 2, ["p", "q", "r", "p"], ["train", "train", "test", "test"])
    assert "group 'p' of set stands on two sides, train and test (1/3.png)" in message(shared)
    partly = make_set([0, 1] * 2, splits=["train", "train", "test", None])
    assert "1 of 4 images of set have no split" in message(partly)
    assert "no image to train on" in message(make_set([0, 1], splits=["test", "test"]))
    one_class = make_set([0, 1] * 5 + [0], splits=["train"] * 10 + ["test"])
    assert "test has no 'b'" in message(one_class)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["00000061_012.png", "00000061_015.png", "00000150_002.png"], r"^(\d+)[_-]"),
        (["p1_a.png", "p1_b.png", "p2_a.png"], r"^([^_]*\d)_"),
        (["p1-a.png", "p1-b.png", "p2-a.png"], r"^([^-]*\d)-"),
        (["IM-0115-0001.jpeg", "IM-0115-0002.jpeg", "IM-0117-0001.jpeg"], r"^(.*\d)[_-]\d+\."),
        (["img_1.png", "img_2.png", "img_3.png"], None),
        (["1_a.png", "2_a.png", "3_a.png"], None),
        (["1.png", "2.png"], None),
    ],
)
def test_a_hint_is_given_where_file_names_share_patients(files: list[str], hint: str | None) -> None:
    images = make_set([0] * len(files))
    named = tuple(
        replace(record, name=f"a/{file}", group=f"a/{file}")
        for record, file in zip(images.records, files, strict=True)
    )
    assert suggest_group_pattern(replace(images, records=named)) == hint


def test_no_hint_where_patients_are_known_or_there_are_no_files() -> None:
    known = make_set([0, 0], ["p", "q"])
    arrays = replace(known, records=tuple(ImageRecord(n, 0, n, pixels=np.zeros(1)) for n in ("1_1", "1_2")))
    assert suggest_group_pattern(known) is None
    assert suggest_group_pattern(arrays) is None


def test_read_splits_are_the_written_ones_in_any_order_of_images(tmp_path: Path) -> None:
    images = make_set([0, 1] * 10, [f"p,{i // 2}\n" for i in range(20)])
    splits = split_images(images, validation=0.2, test=0.2, seed=0)
    write_splits(tmp_path / "splits.csv", images, splits)
    assert read_splits(tmp_path / "splits.csv", images) == splits
    backwards = replace(images, records=images.records[::-1])
    again = read_splits(tmp_path / "splits.csv", backwards)
    assert {backwards.records[i].name for i in again.test} == {images.records[i].name for i in splits.test}
    with (tmp_path / "splits.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert {key: row[key] for key in ("name", "label")} == {"name": "0/0.png", "label": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["splits.csv"]


def test_names_that_are_no_utf8_are_read_as_they_were(tmp_path: Path) -> None:
    images = make_set([0, 1, 0])
    odd = replace(images.records[2], name=os.fsdecode(b"0/\xf6.png"), group=os.fsdecode(b"\xf6"))
    images = replace(images, records=(*images.records[:2], odd))
    write_splits(tmp_path / "splits.csv", images, Splits((0,), (1,), (2,)))
    assert b"\n0/\xf6.png,a,\xf6,test\n" in (tmp_path / "splits.csv").read_bytes()
    assert read_splits(tmp_path / "splits.csv", images) == Splits((0,), (1,), (2,))


def test_the_images_that_train_and_choose_are_told(tmp_path: Path) -> None:
    write_splits(tmp_path / "splits.csv", make_set([0, 1, 0]), Splits((0,), (1,), (2,)))
    assert read_training_names(tmp_path / "splits.csv") == {"0/0.png", "1/1.png"}


def test_frames_that_train_and_choose_are_told_by_their_file(tmp_path: Path) -> None:
    images = make_set([0, 1, 0])
    names = ("0/a.dcm#1", "1/b.dcm#12", "0/c.dcm#2")
    records = [replace(record, name=name) for record, name in zip(images.records, names, strict=True)]
    write_splits(tmp_path / "splits.csv", replace(images, records=tuple(records)), Splits((0,), (1,), (2,)))
    assert read_training_names(tmp_path / "splits.csv") == {"0/a.dcm", "1/b.dcm"}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_splits(tmp_path / "splits.csv", make_set([0, 1]), Splits((0,), (), ()))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_split_is_an_artifact_error(tmp_path: Path) -> None:
    path, images = tmp_path / "splits.csv", make_set([0, 1])
    contents = ["", "name,label\n0/0.png,a\n", "name,label,group,split\n0/0.png,a,p,elsewhere\n"]
    with pytest.raises(ArtifactError, match="cannot read"):
        read_splits(path, images)
    for content in contents:
        path.write_text(content)
        with pytest.raises(ArtifactError, match="must have the columns"):
            read_splits(path, images)


def test_a_split_for_other_images_is_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "splits.csv", make_set([0, 1, 0])
    write_splits(path, images, Splits((0,), (1,), (2,)))
    with pytest.raises(SplitError, match=r"differ in 1 images, such as 0/2\.png"):
        read_splits(path, replace(images, records=images.records[:2]))
    with pytest.raises(SplitError, match="as 'a', set as 'c'"):
        read_splits(path, replace(images, classes=("c", "b")))
    one_patient = replace(images, records=tuple(replace(record, group="p") for record in images.records))
    with pytest.raises(SplitError, match="stands on two sides"):
        read_splits(path, one_patient)


def test_real_patients_stay_on_one_side(nih_opacity: Path) -> None:
    images = open_images(nih_opacity, group_pattern=r"^(\d+)_")
    splits = split_images(images, validation=0.15, test=0.2, seed=0)
    counts = np.array([np.bincount(images.labels[list(side)]) for side in sides(splits)])
    np.testing.assert_allclose(counts, np.outer([0.65, 0.15, 0.2], [294, 309]), atol=4)
    groups = [{images.records[i].group for i in side} for side in sides(splits)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert suggest_group_pattern(open_images(nih_opacity)) == r"^(\d+)[_-]"
