"""Prediction sets: they hold the true class as often as they say."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chanscale.conformal import PredictionSets, fewest_for, find_prediction_sets, rank_of
from chanscale.errors import ConfigError


def draw(rng, count, classes=3, rare=0.2):
    """Return probabilities (N, K) that favour the true class, and labels, of which the last class is rare."""
    frequency = np.array([*[(1 - rare) / (classes - 1)] * (classes - 1), rare])
    labels = rng.choice(classes, size=count, p=frequency)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels] + np.log(frequency)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return shares.astype(np.float32), labels


@given(st.integers(2, 4), st.integers(30, 120), st.sampled_from([0.5, 0.8, 0.9]), st.integers(0, 1000))
def test_sets_of_validation_hold_each_class_as_often_as_was_asked_for(classes, count, coverage, seed):
    shares, labels = draw(np.random.default_rng(seed), count, classes)
    assume(np.bincount(labels, minlength=classes).min() >= fewest_for(coverage))
    metrics = find_prediction_sets(shares, labels, coverage).metrics()
    for k in range(classes):
        assert metrics[f"coverage_{k}"](shares, labels) >= coverage
    assert metrics["coverage"](shares, labels) >= coverage
    assert 1 <= metrics["size"](shares, labels) <= classes


def test_sets_of_new_images_hold_a_rare_class_as_often_as_a_common_one():
    rng, covered, seen = np.random.default_rng(0), np.zeros(3), np.zeros(3)
    for _ in range(400):
        shares, labels = draw(rng, 220)
        held = find_prediction_sets(shares[:200], labels[:200], 0.8).contain(shares[200:])
        hits = held[np.arange(20), labels[200:]]
        covered += np.bincount(labels[200:], hits, minlength=3)
        seen += np.bincount(labels[200:], minlength=3)
    # at least 0.8, less three standard deviations of 1600 images; not far above either, since sets are not wide
    assert (covered / seen >= 0.8 - 3 * np.sqrt(0.16 / 1600)).all()
    assert (covered / seen <= 0.9).all()


def test_a_set_holds_what_reaches_its_bound_and_always_the_most_probable_class():
    sets = PredictionSets(0.9, (0.4, 0.3, 0.9), (20, 20, 20))
    shares = np.array([[0.4, 0.3, 0.3], [0.05, 0.05, 0.9], [0.15, 0.05, 0.8], [0.35, 0.35, 0.3]])
    wanted = [[True, True, False], [False, False, True], [False, False, True], [True, True, False]]
    assert sets.contain(shares).tolist() == wanted


@pytest.mark.parametrize(
    ("share", "count", "rank"), [(0.9, 9, 9), (0.9, 8, 9), (0.9, 99, 90), (0.8, 4, 4), (0.95, 19, 19)]
)
def test_the_rank_is_that_of_finite_samples(share, count, rank):
    assert rank_of(share, count) == rank
    assert (rank <= count) == (count >= fewest_for(share))


def test_too_few_images_of_a_class_are_one_clear_error():
    shares, labels = draw(np.random.default_rng(0), 40)
    few = int(np.bincount(labels).min())
    with pytest.raises(ConfigError) as caught:
        find_prediction_sets(shares, labels, 0.99)
    assert str(caught.value) == (
        f"coverage=0.99 takes 99 validation images of each class, and one has {few}; "
        f"ask for {np.floor(100 * few / (few + 1)) / 100:.2f} at most, or set more aside (validation)"
    )


def test_what_the_error_proposes_is_enough():
    for few in range(1, 60):
        assert fewest_for(np.floor(100 * few / (few + 1)) / 100) <= few
