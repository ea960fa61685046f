import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from chanscale.classifier import class_weights, classification_loss, probabilities
from chanscale.data.loading import decode_images
from chanscale.data.splits import Splits
from chanscale.evaluation import predict
from chanscale.learning import Learner, cosine, fit_intercept, merit
from chanscale.pipeline import scale_and_select, warn_of_imbalance
from chanscale.progress import Watcher
from networks import plain_trunk, randomise
from tiny_fits import tiny_classifier, tiny_config, tiny_images


def test_with_its_intercept_the_mean_probability_is_the_prevalence() -> None:
    """The gradient of the cross-entropy by the intercept is the difference of the two: 0 at the least loss."""
    logits = torch.randn(60, 1) * 2 + 3
    labels = torch.arange(60) % 3 % 2
    shifted = probabilities(logits + fit_intercept(logits, labels))[:, 1]
    torch.testing.assert_close(shifted.mean(), labels.float().mean(), atol=1e-3, rtol=0)


def test_an_intercept_for_each_class_lowers_the_loss() -> None:
    logits, labels = torch.randn(60, 3) + torch.tensor([2.0, 0.0, -2.0]), torch.arange(60) % 3
    before = classification_loss(logits, labels).mean()
    after = classification_loss(logits + fit_intercept(logits, labels), labels).mean()
    assert after < before - 0.1


def test_a_better_auc_wins_and_the_loss_breaks_a_tie() -> None:
    worse, tied = (
        {"validation_auc": 0.8, "validation_loss": 0.1},
        {"validation_auc": 0.9, "validation_loss": 0.5},
    )
    best = {"validation_auc": 0.9, "validation_loss": 0.4}
    assert merit(worse) < merit(tied) < merit(best)


def test_the_cosine_goes_from_one_to_zero() -> None:
    assert cosine(0) == 1
    assert abs(cosine(1)) < 1e-12


# --- rare classes

RARE = Splits(train=(0, 1, *range(2, 24, 2)), validation=tuple(range(24, 40)), test=())
"""Of 13 training images, one is of the second class."""


def test_with_their_weights_all_classes_count_alike() -> None:
    labels = np.array([0] * 90 + [1] * 8 + [2] * 2)
    weights = class_weights(labels, 3)
    per_class = [float(weights[k] * (labels == k).sum()) for k in range(3)]
    assert per_class == pytest.approx([100 / 3] * 3)
    assert float(weights[torch.from_numpy(labels)].mean()) == pytest.approx(1.0)


def test_weights_of_equal_classes_are_one() -> None:
    assert class_weights(np.array([0, 1, 0, 1]), 2).tolist() == [1.0, 1.0]


def test_a_balanced_batch_has_the_loss_that_equal_classes_would_have() -> None:
    model = tiny_classifier()
    with torch.no_grad():
        model.head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    images = tiny_images()
    learner = Learner(images, RARE, tiny_config(balance=True, batch_size=13, augment=False), Watcher())
    batch = next(iter(learner.train.epoch()))
    picked = batch._replace(
        images=images.batch(RARE.train)[0], labels=torch.from_numpy(images.images.labels[list(RARE.train)])
    )
    loss = learner.backward(model, picked, epoch=0, done=0)
    with torch.no_grad():
        single = classification_loss(model.head(model.feature_map(picked.images)), picked.labels)
    of_classes = [single[picked.labels == k].mean() for k in (0, 1)]
    assert loss == pytest.approx(float(sum(of_classes)) / 2, rel=1e-5)


def test_without_it_the_loss_is_the_mean() -> None:
    learner = Learner(tiny_images(), RARE, tiny_config(augment=False), Watcher())
    model = tiny_classifier()
    batch = next(iter(learner.train.epoch()))
    with torch.no_grad():
        wanted = classification_loss(model.head(model.feature_map(batch.images)), batch.labels).mean()
    assert learner.backward(model, batch, epoch=0, done=0) == pytest.approx(float(wanted), rel=1e-5)


def test_a_rare_one_of_three_classes_keeps_its_prevalence_when_it_is_weighed() -> None:
    rng, images = np.random.default_rng(0), tiny_images(120)
    labels = np.where(np.arange(120) % 10 == 0, 2, np.where(np.arange(120) % 10 < 4, 1, 0))
    own = [
        replace(
            record, label=int(label), pixels=rng.integers(0, 200 + 25 * int(label), (32, 32)).astype(np.uint8)
        )
        for record, label in zip(images.images.records, labels, strict=True)
    ]
    data = replace(images.images, classes=("a", "b", "c"), records=tuple(own))
    run = scale_and_select(
        randomise(plain_trunk((8, 16, 16))), data, config=tiny_config(balance=True, test=0.0, calibrate=False)
    )
    decoded = decode_images(data, image_size=32)
    scores, _ = predict(run.model, decoded, range(120))
    prevalence = np.bincount(labels) / 120
    # The intercepts are fitted on 18 validation images, of which 2 are rare.
    assert scores.mean(0) == pytest.approx(prevalence, abs=0.06)


def test_equal_classes_are_weighed_as_they_were() -> None:
    trunk = randomise(plain_trunk((8, 16, 16)))
    plain, weighed = (
        scale_and_select(copy.deepcopy(trunk), tiny_images().images, config=tiny_config(balance=balance))
        for balance in (False, True)
    )
    assert weighed.history[-1]["train_loss"] == plain.history[-1]["train_loss"]


def test_a_rare_class_is_told_of_unless_it_is_weighed(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_imbalance(tiny_config(balance=True), tiny_images(), RARE)
        warn_of_imbalance(tiny_config(), tiny_images(), Splits(tuple(range(24)), (24, 25), ()))
        assert not caplog.text
        warn_of_imbalance(tiny_config(), tiny_images(), RARE)
    assert "of 13 training images, 1 are yes" in caplog.text
    assert "--sensitivity" in caplog.text
    assert "--balance" not in caplog.text


def test_a_threshold_is_no_help_where_the_negative_class_is_the_rare_one(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_imbalance(tiny_config(), tiny_images(), replace(RARE, train=(0, *range(1, 24, 2))))
    assert "of 13 training images, 1 are no:" in caplog.text
    assert "--balance" in caplog.text
    assert "--sensitivity" not in caplog.text
