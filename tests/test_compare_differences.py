"""Intervals and paired differences, on scores whose difference is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chanscale.comparison.differences import Scores, mean_interval, paired_difference, weighted_auc
from chanscale.metrics import mean_auc


def scores(positive, labels, groups=None) -> Scores:
    """Scores of two classes, from the probability of the second."""
    positive, names = np.asarray(positive, dtype=float), [f"{i}.png" for i in range(len(labels))]
    both = np.stack([1 - positive, positive], axis=1)
    return Scores(tuple(names), tuple(groups or names), np.asarray(labels), both)


def noisy(rng, labels, signal):
    return 1 / (1 + np.exp(-(signal * (2 * labels - 1) + rng.normal(size=len(labels)))))


@given(seed=st.integers(0, 100), count=st.integers(4, 40), classes=st.integers(2, 4))
def test_the_weighted_auc_is_that_of_repeated_images(seed, count, classes):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    probabilities = rng.integers(0, 6, (count, classes)) / 6  # with ties
    weights = rng.integers(0, 3, (5, count))
    got = weighted_auc(probabilities, labels, weights)
    for row, value in zip(weights, got, strict=True):
        repeated = np.repeat(np.arange(count), row)
        wanted = mean_auc(probabilities[repeated], labels[repeated]) if len(repeated) else math.nan
        np.testing.assert_allclose(value, wanted, atol=1e-12)


def test_identical_scores_differ_by_exactly_nothing():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    one = scores(noisy(rng, labels, 0.5), labels)
    found = paired_difference([(one, one)] * 3)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_known_difference_is_found():
    labels = np.array([0, 0, 1, 1] * 15)
    perfect = scores(labels * 0.8 + 0.1, labels)
    # Of each 2 x 2 pairs of images one is in the wrong order: 0.75.
    worse = scores(np.array([0.1, 0.6, 0.5, 0.9] * 15), labels)
    found = paired_difference([(perfect, worse)])
    assert found.value == pytest.approx(0.25)
    assert 0.1 < found.low < 0.25 < found.high < 0.4
    back = paired_difference([(worse, perfect)])
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_has_the_width_that_repetition_has():
    def draw(rng):
        labels = np.arange(100) % 2
        shared = rng.normal(size=100)
        return tuple(scores(noisy(rng, labels, 0.6) + 0.3 * shared, labels) for _ in range(2))

    rng = np.random.default_rng(1)
    values = [paired_difference([draw(rng)], resamples=1).value for _ in range(300)]
    widths = [found.high - found.low for found in (paired_difference([draw(rng)]) for _ in range(10))]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.2)


def test_cells_keep_a_scale_of_their_own():
    labels = np.arange(40) % 2
    one = scores(0.1 + 0.3 * labels, labels)
    shifted = scores(0.6 + 0.3 * labels, labels)
    other = scores(np.full(40, 0.5), labels)
    assert paired_difference([(one, other), (shifted, other)]).value == pytest.approx(0.5)


def test_patients_are_drawn_whole_and_alike_in_every_cell():
    rng = np.random.default_rng(2)
    labels = np.arange(30) % 2
    one, other = (noisy(rng, labels, signal) for signal in (1.0, 0.3))
    single = paired_difference([(scores(one, labels), scores(other, labels))])
    groups = [str(i) for i in range(30)] * 4
    films = tuple(scores(np.tile(s, 4), np.tile(labels, 4), groups) for s in (one, other))
    whole = paired_difference([films])
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high))
    # The same images in four cells, as with four seeds, say no more than in one.
    again = paired_difference([(scores(one, labels), scores(other, labels))] * 4)
    assert (again.low, again.high) == pytest.approx((single.low, single.high))
    apart = tuple(scores(np.tile(s, 4), np.tile(labels, 4)) for s in (one, other))
    narrow = paired_difference([apart])
    assert narrow.high - narrow.low < 0.7 * (single.high - single.low)


def test_nothing_to_compare_is_not_a_number():
    one = scores([0.2, 0.3], [0, 0])
    assert math.isnan(paired_difference([]).value)
    assert math.isnan(paired_difference([(one, one)]).value)


def test_of_one_patient_there_is_a_difference_and_no_interval():
    labels = np.arange(6) % 2
    one, other = (scores(values, labels, ["p"] * 6) for values in (0.2 + 0.6 * labels, np.full(6, 0.5)))
    found = paired_difference([(one, other)])
    assert found.value == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_mean_has_a_t_interval():
    found = mean_interval([0.8, 0.9, math.nan])
    # t of one degree of freedom is 12.706; the standard error is 0.05.
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.85, 0.85 - 0.6353, 0.85 + 0.6353), abs=1e-3
    )
    alone = mean_interval([0.7])
    assert alone.value == 0.7
    assert math.isnan(alone.low)
    assert math.isnan(mean_interval([]).value)
