"""How good the models of a cross-validation are on images that they did not see, and how sure that is."""

from dataclasses import replace
from typing import Any

import numpy as np

from chanscale.calibration import brier_score, negative_log_likelihood
from chanscale.comparison.differences import Scores, paired_difference
from chanscale.crossval.answers import Answers
from chanscale.metrics import Estimate, Floats, Ints, Metric, estimate, metrics_for

PROBABILITIES: dict[str, Metric] = {"nll": negative_log_likelihood, "brier": brier_score}

RESAMPLES = 2000
"""Draws of patients behind an interval."""

NOTES = (
    "Pooled: the images of all folds together, each with the probability of the model that left it out; over several "
    "repeats the mean. Models of different folds need not mean the same by a probability, which makes a pooled AUC, if "
    "anything, lower than the mean over folds.",
    "Intervals, 95 %: bootstrap over patients, or over images where no patient is known. They know of others, not of "
    "other trainings: the models of two folds share most of their training images, and no unbiased estimate of the "
    "variance of a cross-validation exists (Bengio & Grandvalet 2004). Take them as too narrow.",
    "The spread over repeats comes from other folds and other trainings on the same images; it says nothing of other "
    "patients, and does not shrink to what an interval should be by more repeats.",
    "What is judged is training on the images less a fold, which are fewer than there are.",
)
"""What the figures do not hold, as the file says it."""


def judge_folds(answers: Answers, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return `pooled`, `over_folds` and `over_repeats`, each by figure, as plain numbers."""
    metrics = metrics_for(len(answers.images.classes)) | PROBABILITIES
    shares = answers.out_of_fold
    pooled = estimate(
        {name: average(metric) for name, metric in metrics.items()},
        shares.transpose(1, 0, 2), answers.labels, answers.groups, resamples=resamples,
    )  # fmt: skip
    repeats = {name: [metric(one, answers.labels) for one in shares] for name, metric in metrics.items()}
    scores = answers.scores()
    folds = {
        name: [metric(one.probabilities, one.labels) for one in scores] for name, metric in metrics.items()
    }
    over_folds = {name: _spread(values) for name, values in folds.items()}
    over_folds["auc"] |= mean_auc_of(scores, resamples=resamples).to_dict()
    return {
        "pooled": {name: figure.to_dict() for name, figure in pooled.items()},
        "over_folds": over_folds,
        "over_repeats": {name: _spread(values) for name, values in repeats.items()},
    }


def average(metric: Metric) -> Metric:
    """Return the mean of `metric` over models, for probabilities (N, M, K)."""

    def mean(probabilities: Floats, labels: Ints) -> float:
        models = np.moveaxis(probabilities, 1, 0)
        return float(np.mean([metric(one, labels) for one in models]))

    return mean


def mean_auc_of(scores: list[Scores], *, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of the AUCs that models have on the images that each was asked for, with its interval.

    Patients are drawn from all images together, as for a difference: here, from the AUC of chance, which is 0.5.
    """
    above = paired_difference([(one, _chance(one)) for one in scores], resamples=resamples)
    return Estimate(*(0.5 + value for value in (above.value, above.low, above.high)))


def _chance(scores: Scores) -> Scores:
    return replace(scores, probabilities=np.full_like(scores.probabilities, 0.5))


def _spread(values: list[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"value": float(np.mean(values)), "standard_deviation": spread, "values": values}
