"""Folds keep patients together and cover all images; smaller training sets lie within larger ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chanscale.comparison.folds import assign_folds, learning_and_test, order_images, split_for_cell
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.splits import split_images
from chanscale.errors import ConfigError, SplitError


def make_images(patients=90, positive=3, films=(1, 2, 4)) -> ImageSet:
    """Images of patients with a few films each; one patient in `positive` is ill."""
    records = [
        ImageRecord(f"{patient:03}_{film}.png", int(patient % positive == 0), f"{patient:03}")
        for patient in range(patients)
        for film in range(films[patient % len(films)])
    ]
    return ImageSet(Path("made"), ("no", "yes"), tuple(records))


def split(images, fold=0, seed=0, size=None, folds=5, fold_seed=0):
    return split_for_cell(
        images, fold=fold, folds=folds, fold_seed=fold_seed, seed=seed, size=size, validation=0.15, test=0.2
    )


def groups_of(images, indices):
    return {images.records[index].group for index in indices}


def share_of(images, indices):
    return images.labels[list(indices)].mean()


# --- folds


@given(seed=st.integers(0, 50), folds=st.integers(2, 8), patients=st.integers(48, 120))
def test_each_patient_lies_in_one_fold_and_each_class_in_all(seed, folds, patients):
    images = make_images(patients)
    assigned = assign_folds(images, folds=folds, seed=seed)
    assert set(assigned.tolist()) == set(range(folds))
    homes = {(record.group, fold) for record, fold in zip(images.records, assigned.tolist(), strict=True)}
    assert len(homes) == patients
    for fold in range(folds):
        assert set(images.labels[assigned == fold].tolist()) == {0, 1}


def test_folds_are_stratified_and_of_about_one_size():
    images = make_images(300)
    assigned = assign_folds(images, folds=5, seed=0)
    for fold in range(5):
        own = np.flatnonzero(assigned == fold)
        assert len(own) == pytest.approx(len(images) / 5, abs=6)
        assert share_of(images, own) == pytest.approx(images.labels.mean(), abs=0.04)


def test_every_image_is_test_once():
    images = make_images()
    sides = [split(images, fold=fold) for fold in range(5)]
    assert sorted(index for side in sides for index in side.test) == list(range(len(images)))


def test_sides_are_disjoint_by_patient_and_cover_all():
    images = make_images()
    for fold in range(5):
        sides = split(images, fold=fold, seed=3)
        assert sorted(sides.train + sides.validation + sides.test) == list(range(len(images)))
        train, validation, test = (groups_of(images, s) for s in (sides.train, sides.validation, sides.test))
        assert not (train & validation)
        assert not ((train | validation) & test)
        rest = len(sides.train) + len(sides.validation)
        assert len(sides.validation) == pytest.approx(0.15 * rest, abs=4)


def test_the_seed_of_a_cell_draws_validation_and_leaves_the_test_fold():
    images = make_images()
    assert split(images, seed=0).test == split(images, seed=1).test
    assert split(images, seed=0).validation != split(images, seed=1).validation
    assert split(images, fold_seed=0).test != split(images, fold_seed=1).test


def test_one_fold_is_the_split_of_a_fit():
    images = make_images()
    assert split(images, folds=1, seed=4) == split_images(images, validation=0.15, test=0.2, seed=4)


def test_what_cannot_be_folded_says_why():
    images = make_images(12, positive=4)
    with pytest.raises(
        SplitError, match=r"class 'yes' of made has 3 groups .* too few for --folds 5; use fewer"
    ):
        assign_folds(images, folds=5, seed=0)
    sided = replace(images, records=tuple(replace(record, split="train") for record in images.records))
    with pytest.raises(SplitError, match="use --folds 1"):
        assign_folds(sided, folds=2, seed=0)
    with pytest.raises(ConfigError, match="needs test images"):
        split_for_cell(images, fold=0, folds=1, fold_seed=0, seed=0, size=None, validation=0.2, test=0)


# --- numbers of training images


@pytest.mark.parametrize("seed", range(4))
def test_a_smaller_training_set_lies_within_a_larger_and_all_else_stays(seed):
    images = make_images(200)
    whole = split(images, seed=seed)
    before: set[int] = set()
    for size in (10, 25, 50, 100, None):
        sides = split(images, seed=seed, size=size)
        assert sides.test == whole.test
        assert len(sides.train) == (size or len(whole.train))
        assert before < set(sides.train) <= set(whole.train)
        before = set(sides.train)


@pytest.mark.parametrize("folds", [1, 5])
def test_no_more_images_validate_than_train_and_fewer_lie_within_more(folds):
    images = make_images(200)
    whole = split(images, folds=folds).validation
    assert 50 < len(whole) < 100
    before: set[int] = set()
    for size in (10, 25, 50):
        chosen = split(images, folds=folds, size=size).validation
        assert len(chosen) == size
        assert list(chosen) == sorted(chosen)
        assert before < set(chosen) < set(whole)
        assert share_of(images, chosen) == pytest.approx(share_of(images, whole), abs=4 / size)
        assert len(groups_of(images, chosen) & groups_of(images, set(whole) - set(chosen))) <= 1
        before = set(chosen)
    assert split(images, folds=folds, size=100).validation == whole
    assert (
        split(images, folds=folds, seed=1, size=10).validation
        != split(images, folds=folds, size=10).validation
    )


@given(seed=st.integers(0, 30), positive=st.integers(2, 6))
def test_every_prefix_is_stratified_and_cuts_one_patient_at_most(seed, positive):
    images = make_images(120, positive)
    order = order_images(images, range(len(images)), seed=seed)
    assert sorted(order) == list(range(len(images)))
    share, largest = images.labels.mean(), 4
    for size in range(1, len(order) + 1):
        count = images.labels[order[:size]].sum()
        assert abs(count - share * size) <= largest
        cut = groups_of(images, order[:size]) & groups_of(images, order[size:])
        assert len(cut) <= 1


def test_another_seed_draws_others():
    images = make_images()
    assert split(images, seed=0, size=20).train != split(images, seed=1, size=20).train


def test_a_patient_of_two_classes_is_drawn_once():
    records = [ImageRecord(f"{p}_{label}", label, str(p)) for p in range(9) for label in (0, 1)]
    images = ImageSet(Path("made"), ("no", "yes"), tuple(records))
    assert sorted(order_images(images, range(18), seed=0)) == list(range(18))


@pytest.mark.parametrize(
    ("size", "words"), [(1000, "more than the .* use all"), (1, "leaves no training image")]
)
def test_a_size_that_cannot_be_drawn_says_why(size, words):
    with pytest.raises(ConfigError, match=words):
        split(make_images(), size=size)


def test_a_size_without_an_image_to_validate_by_says_so():
    records = [
        replace(record, split="train" if place < 40 else ("validation", "test")[place % 2])
        for place, record in enumerate(make_images(80, films=(1,)).records)
    ]
    # In validation, one in twenty is ill: of two images that stand for it, none is.
    rare = [replace(r, label=int(i == 42)) if r.split == "validation" else r for i, r in enumerate(records)]
    images = ImageSet(Path("made"), ("no", "yes"), tuple(rare))
    assert len(split(images, folds=1, size=20).validation) == 20
    with pytest.raises(ConfigError, match="--sizes 2 leaves no validation image of 'yes'; use more"):
        split(images, folds=1, size=2)


def test_a_method_is_given_no_test_image():
    images = make_images()
    sides = split(images, size=20)
    learning, test = learning_and_test(images, sides)
    assert {record.split for record in learning.records} == {"train", "validation"}
    assert len(learning.on_side("train")) == 20
    assert [record.name for record in test.records] == [images.records[i].name for i in sides.test]
    assert not {record.group for record in learning.records} & {record.group for record in test.records}
