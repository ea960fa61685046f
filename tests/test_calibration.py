"""Probabilities: their figures, and the temperature that they are calibrated by."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from sklearn.metrics import brier_score_loss, log_loss

from chanscale.calibration import (
    brier_score,
    calibration_error,
    judge_calibration,
    negative_log_likelihood,
    said_and_right,
)
from chanscale.decision_rules import temper
from chanscale.metrics import accuracy, mean_auc
from chanscale.temperature import FEWEST, HIGHEST, find_temperature, fold_temperature
from networks import build_classifier, images

FOLDED = 1e-6  # of the largest logit: one rounding of each weight to fp32


def draw(classes, count=300, *, boldness=1.0, seed=0):
    """Return logits that would be true if they were divided by `boldness`, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(count, 1 if classes == 2 else classes)) * 1.5
    shares = np.hstack([1 - expit(true), expit(true)]) if classes == 2 else softmax(true, axis=1)
    labels = np.array([rng.choice(classes, p=row) for row in shares])
    return (boldness * true).astype(np.float32), labels


def nll_of(logits, labels, temperature):
    return negative_log_likelihood(temper(logits, temperature), labels)


# --- figures


def test_the_nll_and_brier_score_are_those_of_scikit_learn():
    logits, labels = draw(2)
    shares = temper(logits, 1)
    assert negative_log_likelihood(shares, labels) == pytest.approx(log_loss(labels, shares), rel=1e-6)
    assert brier_score(shares, labels) == pytest.approx(brier_score_loss(labels, shares[:, 1]))
    logits, labels = draw(4)
    shares = softmax(logits.astype(np.float64), axis=1)
    assert negative_log_likelihood(shares, labels) == pytest.approx(log_loss(labels, shares))


def test_what_was_held_impossible_and_is_so_costs_much_but_not_all():
    assert negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(7 * np.log(10))


def test_the_calibration_error_is_the_mean_gap_of_bins_of_equally_many_images():
    logits, labels = draw(2, 200)
    said, right = said_and_right(temper(logits, 1), labels)
    order = np.argsort(said)
    gaps = [abs(said[part].mean() - right[part].mean()) for part in np.split(order, 10)]
    assert calibration_error(temper(logits, 1), labels) == pytest.approx(np.mean(gaps))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_order_of_images_changes_no_figure(classes):
    logits, labels = draw(classes, 90)
    shares = temper(logits, 1).round(1)  # many share a probability
    order = np.random.default_rng(1).permutation(len(labels))
    for metric in (calibration_error, brier_score, negative_log_likelihood):
        assert metric(shares[order], labels[order]) == pytest.approx(metric(shares, labels), abs=1e-12)


def test_probabilities_that_come_true_have_no_calibration_error():
    labels = np.array([0] * 8 + [1] * 2 + [0] * 2 + [1] * 8)
    shares = np.repeat([0.2, 0.8], 10)
    assert calibration_error(np.stack([1 - shares, shares], 1), labels) == pytest.approx(0)
    assert calibration_error(np.eye(2)[1 - labels], labels) == pytest.approx(1)


def test_each_figure_has_an_interval():
    logits, labels = draw(2, 60)
    found = judge_calibration(temper(logits, 1), labels, np.arange(60))
    assert list(found) == ["nll", "ece", "brier"]
    for figure in found.values():
        assert 0 < figure.low < figure.high


# --- temperature


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("boldness", [0.4, 1.0, 3.0])
def test_the_temperature_takes_back_how_bold_logits_are(classes, boldness):
    logits, labels = draw(classes, 4000, boldness=boldness)
    assert find_temperature(logits, labels).value == pytest.approx(boldness, rel=0.1)


@pytest.mark.parametrize("classes", [2, 3])
def test_no_temperature_is_better(classes):
    logits, labels = draw(classes, boldness=2)
    found = find_temperature(logits, labels)
    best = minimize_scalar(lambda t: nll_of(logits, labels, t), bounds=(0.1, 10), method="bounded").x
    assert found.value == pytest.approx(best, rel=1e-2)
    assert found.nll_after == pytest.approx(nll_of(logits, labels, found.value), abs=1e-6)
    assert found == find_temperature(logits, labels)


@given(st.integers(2, 4), st.integers(FEWEST, 60), st.floats(0.01, 30), st.integers(0, 1000), st.booleans())
def test_the_nll_of_validation_never_rises(classes, count, boldness, seed, guess):
    logits, labels = draw(classes, count, boldness=boldness, seed=seed)
    if guess:  # labels that the logits know nothing of
        labels = np.random.default_rng(seed).integers(classes, size=count)
    found = find_temperature(logits, labels)
    assert 1 / HIGHEST <= found.value <= HIGHEST
    if found.nll_before is None:
        assert found.value == 1
        assert found.reason
    else:
        assert found.nll_after <= found.nll_before
        assert bool(found.reason) == (found.value in (1 / HIGHEST, HIGHEST))


def test_with_few_images_or_none_wrong_the_temperature_is_one_and_says_why():
    logits, labels = draw(2, FEWEST - 1)
    few = find_temperature(logits, labels)
    assert (few.value, few.reason) == (1, "20 validation images are needed, and there are 19")
    labels = np.arange(40) % 2
    separated = find_temperature((4.0 * labels - 1)[:, None].astype(np.float32), labels)
    assert separated.value == 1
    assert "all validation images are right" in separated.reason


def test_logits_that_know_nothing_become_as_mild_as_may_be():
    logits, labels = draw(2, 100)
    found = find_temperature(-3 * logits, labels)
    assert found.value == HIGHEST
    assert "bound" in found.reason


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_no_ranking_and_no_answer_changes(classes, temperature):
    logits, labels = draw(classes, 200)
    before, after = temper(logits, 1), temper(logits, temperature)
    assert not np.allclose(before, after, atol=0.01)
    assert (before.argmax(1) == after.argmax(1)).all()
    assert accuracy(before, labels) == accuracy(after, labels)
    if classes == 2:  # of more, a probability is compared between images, where T may turn an order round
        assert mean_auc(before, labels) == pytest.approx(mean_auc(after, labels), abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_a_folded_temperature_equals_divided_logits(classes):
    model, batch = build_classifier(classes=classes), images(6, 32)
    wanted = model(batch) / 1.7
    folded = fold_temperature(model, 1.7)
    assert (folded(batch) - wanted).abs().max() <= FOLDED * wanted.abs().max()
    assert torch.equal(model(batch) / 1.7, wanted)  # the model itself is as it was
    maps = folded.head.class_map(folded.feature_map(batch))
    torch.testing.assert_close(maps.mean((2, 3)), folded(batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_temperature_of_one_changes_nothing():
    model, batch = build_classifier(), images(6, 32)
    assert torch.equal(fold_temperature(model, 1.0)(batch), model(batch))
