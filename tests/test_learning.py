import torch

from chanscale.classifier import classification_loss, probabilities
from chanscale.learning import cosine, fit_intercept, merit


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
