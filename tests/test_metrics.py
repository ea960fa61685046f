import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, roc_auc_score

from chanscale.errors import DataError
from chanscale.metrics import (
    accuracy,
    area_under_roc,
    estimate,
    mean_auc,
    metrics_for,
    sensitivity,
    specificity,
)


def two_columns(positive):
    positive = np.asarray(positive, dtype=float)
    return np.stack([1 - positive, positive], 1)


def brute_force_auc(scores, positive):
    """Share of pairs in which the positive one has the larger score; a tie counts half."""
    differences = scores[positive][:, None] - scores[~positive]
    return np.mean((differences > 0) + 0.5 * (differences == 0))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.8, 1.0]), st.booleans()), min_size=2, max_size=30)
)
def test_auc_equals_brute_force_ties_included(pairs):
    scores, positive = (np.array(values) for values in zip(*pairs, strict=True))
    got = mean_auc(two_columns(scores), positive.astype(int))
    if positive.all() or not positive.any():
        assert np.isnan(got)
    else:
        assert got == pytest.approx(brute_force_auc(scores, positive))


def test_auc_of_several_classes_is_the_mean_of_each_against_the_rest():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(3, size=60), rng.dirichlet(np.ones(3), size=60)
    wanted = roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert mean_auc(scores, labels) == pytest.approx(wanted)
    by_hand = np.mean([brute_force_auc(scores[:, k], labels == k) for k in range(3)])
    assert mean_auc(scores, labels) == pytest.approx(by_hand)
    assert np.isnan(mean_auc(scores[labels > 0], labels[labels > 0]))


def test_shares_equal_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=50), two_columns(rng.random(50))
    (negative, false_positive), (false_negative, positive) = confusion_matrix(labels, scores.argmax(1))
    assert accuracy(scores, labels) == pytest.approx((negative + positive) / 50)
    assert sensitivity(scores, labels) == pytest.approx(positive / (positive + false_negative))
    assert specificity(scores, labels) == pytest.approx(negative / (negative + false_positive))


def test_without_images_of_a_class_its_share_is_not_defined():
    scores = two_columns([0.2, 0.9])
    assert np.isnan(sensitivity(scores, np.array([0, 0])))
    assert np.isnan(specificity(scores, np.array([1, 1])))


def test_two_classes_have_sensitivity_and_specificity_and_more_have_not():
    assert list(metrics_for(2)) == ["auc", "accuracy", "sensitivity", "specificity"]
    assert list(metrics_for(3)) == ["auc", "accuracy"]


def draw(rng, count, rate=0.8):
    """Return probabilities that are right at a given rate, and labels."""
    labels = rng.integers(2, size=count)
    right = rng.random(count) < rate
    return two_columns(np.where(right, labels, 1 - labels)), labels


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(150):
        scores, labels = draw(rng, 80)
        got = estimate({"accuracy": accuracy}, scores, labels, np.arange(80), resamples=200, seed=seed)[
            "accuracy"
        ]
        covered += got.low <= 0.8 <= got.high
    # 95 % of 150, less three standard deviations and what the percentile method lacks at 80 images
    assert covered / 150 >= 0.87


def test_the_same_seed_gives_the_same_interval_around_the_value():
    scores, labels = draw(np.random.default_rng(0), 60)
    first, again, other = (
        estimate(metrics_for(2), scores, labels, np.arange(60), resamples=100, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    for name, metric in metrics_for(2).items():
        assert first[name].value == metric(scores, labels)
        assert first[name].low <= first[name].value <= first[name].high
    assert first["auc"].to_dict() == {
        "value": first["auc"].value,
        "low": first["auc"].low,
        "high": first["auc"].high,
    }


def test_groups_are_resampled_whole():
    groups = np.array(["b", "a", "b", "c", "b", "c"])
    drawn = []

    def spy(probabilities, labels):
        drawn.append(np.bincount(labels, minlength=len(groups)))
        return 0.0

    estimate({"spy": spy}, two_columns(np.zeros(6)), np.arange(6), groups, resamples=50)
    for counts in drawn[1:]:  # the first is the value itself
        per_group = [set(counts[groups == name]) for name in "abc"]
        assert all(len(times) == 1 for times in per_group)
        assert sum(times.pop() for times in per_group) == 3
    assert len({tuple(counts) for counts in drawn}) > 5


def test_images_of_few_patients_give_wider_intervals():
    scores, labels = draw(np.random.default_rng(0), 20)
    scores, labels = np.repeat(scores, 10, axis=0), np.repeat(labels, 10)
    by_image, by_patient = (
        estimate({"accuracy": accuracy}, scores, labels, groups, resamples=300)["accuracy"]
        for groups in (np.arange(200), np.repeat(np.arange(20), 10))
    )
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)


def test_draws_that_lack_a_class_are_left_out_and_a_figure_that_is_not_defined_stays_so():
    scores, labels = two_columns([0.1, 0.2, 0.9]), np.array([0, 0, 1])
    got = estimate(metrics_for(2), scores, labels, np.arange(3), resamples=100)
    assert (got["auc"].low, got["auc"].high) == (1, 1)
    one_class = estimate(metrics_for(2), scores, np.array([0, 0, 0]), np.arange(3), resamples=20)
    assert np.isnan([one_class["auc"].value, one_class["auc"].low, one_class["auc"].high]).all()


def test_of_one_patient_there_is_no_interval():
    scores, labels = two_columns([0.2, 0.9, 0.4]), np.array([0, 1, 1])
    for groups in (np.zeros(3), np.array(["a"] * 3)):
        found = estimate({"accuracy": accuracy}, scores, labels, groups)["accuracy"]
        assert found.value == pytest.approx(2 / 3)
        assert np.isnan([found.low, found.high]).all()


def test_no_images_are_an_error():
    with pytest.raises(DataError, match="choose a test share above 0"):
        estimate(metrics_for(2), np.zeros((0, 2)), np.zeros(0, int), np.zeros(0))


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_the_area_is_that_of_scikit_learn_with_ties_too(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        scores = rng.integers(0, levels, 40) / levels
        positive = rng.permutation(np.arange(40) < rng.integers(1, 40))
        wanted = roc_auc_score(positive, scores)
        assert area_under_roc(scores, positive) == pytest.approx(wanted, abs=1e-12)
