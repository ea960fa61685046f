"""The threshold that is chosen for a sensitivity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chanscale.conformal import just_below
from chanscale.errors import ConfigError
from chanscale.operating_point import OperatingPoint, find_operating_point


def draw(count, seed=0):
    """Return probabilities (N, 2), higher for the positive images, and labels; both classes are there."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 2)
    positive = (1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1)))).astype(np.float32)
    return np.stack([1 - positive, positive], 1), labels


@given(st.integers(2, 80), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]), st.integers(0, 1000))
def test_validation_reaches_the_sensitivity_that_was_asked_for(count, wanted, seed):
    shares, labels = draw(count, seed)
    point = find_operating_point(shares, labels, wanted)
    assert point.metrics()["sensitivity"](shares, labels) >= wanted
    assert point.positives == (labels == 1).sum()


def test_the_threshold_is_the_order_statistic_of_finite_samples():
    positive = np.linspace(0.02, 0.98, 49)
    shares, labels = np.stack([1 - positive, positive], 1), np.ones(49, int)
    point = find_operating_point(shares, labels, 0.9)
    # ceil(0.9 * 50) = 45 of 49 from the top: the fifth from below, where 4 misses of 49 would do
    assert point.threshold == pytest.approx(positive[4], abs=1e-3)
    assert (point.rests_on, point.doubt) == (5, None)
    assert point.call(shares).sum() == 45


def test_a_new_image_reaches_the_threshold_as_often_as_promised():
    rng, found = np.random.default_rng(0), 0
    for _ in range(2000):
        positive = rng.random(25)
        shares = np.stack([1 - positive, positive], 1)
        point = find_operating_point(shares[:24], np.ones(24, int), 0.8)
        found += bool(point.call(shares[24:])[0])
    assert found / 2000 == pytest.approx(0.8, abs=3 * np.sqrt(0.16 / 2000))  # 3 standard deviations


def test_rounding_loses_no_image_that_the_threshold_rests_on():
    for share in (0.0, 1e-12, 1e-4, 0.3, 0.9, 1 - 1e-7, 1.0):
        bound = just_below(share)
        assert 0 <= bound < 1
        assert bound < share or share == 0
    logit = np.log(0.3 / 0.7)
    assert just_below(0.3) == pytest.approx(1 / (1 + np.exp(1e-3 - logit)))


def test_figures_at_the_threshold_are_those_of_the_confusion():
    shares, labels = draw(60)
    point = OperatingPoint(0.3, 0.9, 30, 6)
    called, positive = shares[:, 1] >= 0.3, labels == 1
    got = {name: metric(shares, labels) for name, metric in point.metrics().items()}
    assert got == {
        "sensitivity": pytest.approx((called & positive).sum() / positive.sum()),
        "specificity": pytest.approx((~called & ~positive).sum() / (~positive).sum()),
        "ppv": pytest.approx((called & positive).sum() / called.sum()),
        "npv": pytest.approx((~called & ~positive).sum() / (~called).sum()),
    }


def test_a_share_of_nothing_is_not_defined():
    shares, labels = np.array([[0.2, 0.8]]), np.array([1])
    got = {name: metric(shares, labels) for name, metric in OperatingPoint(0.5, 0.9, 9, 1).metrics().items()}
    assert (got["sensitivity"], got["ppv"]) == (1, 1)
    assert np.isnan([got["specificity"], got["npv"]]).all()


def test_a_threshold_that_rests_on_few_images_is_told_so():
    shares, labels = draw(40)
    doubt = find_operating_point(shares, labels, 0.9).doubt
    assert doubt == (
        "with 20 positive validation images, the threshold for a sensitivity of 0.9 rests on the 2 lowest of them "
        "alone: on other images expect another"
    )
    assert (
        "takes 99 positive validation images, and there are 20"
        in find_operating_point(shares, labels, 0.99).doubt
    )


def test_more_classes_or_no_positive_image_are_an_error():
    with pytest.raises(ConfigError, match="there are 3; leave it out"):
        find_operating_point(np.full((4, 3), 1 / 3), np.array([0, 1, 2, 1]), 0.9)
    with pytest.raises(ConfigError, match="there are none; set more aside"):
        find_operating_point(np.full((4, 2), 0.5), np.zeros(4, int), 0.9)
