"""Whether the average of the models of a cross-validation is better than one of them, on images in no fold."""

import math
from typing import Any

import numpy as np

from chanscale.comparison.differences import paired_difference
from chanscale.crossval.answers import Answers
from chanscale.crossval.figures import PROBABILITIES, RESAMPLES, average, mean_auc_of
from chanscale.metrics import Estimate, Floats, Ints, Metric, estimate

NOTES = (
    "Single: the mean of the figures of the models, not of their probabilities. Difference: the average of the models "
    "less a single one; paired bootstrap over the patients of the test images, or over images where none is known.",
    "For NLL and Brier score, an average is never worse than its members are on average, on any images, since both "
    "are convex. Whether it ranks images better, the AUC alone can tell.",
    "An average takes as much time and memory as all its members.",
)


def judge_average(outer: Answers | None, *, resamples: int = RESAMPLES) -> dict[str, Any] | None:
    """Return AUC, NLL and Brier score of the average, of a single model, and their difference, with intervals.

    `helped`: whether the interval of the AUC's difference is above 0; `hurt`: below it. None without images in no fold.
    """
    if outer is None:
        return None
    figures = {"auc": _compare_auc(outer, resamples)} | {
        name: _compare(outer, metric, resamples) for name, metric in PROBABILITIES.items()
    }
    gain = figures["auc"]["difference"]
    return {
        "models": len(outer.members), "images": len(outer.images), **outer.count_patients(),
        "helped": gain.low > 0, "hurt": gain.high < 0,
        **{name: {k: v.to_dict() for k, v in figure.items()} for name, figure in figures.items()},
        "notes": list(NOTES),
    }  # fmt: skip


def describe_average(judged: dict[str, Any] | None) -> str:
    """Return in one line whether averaging helped, and by how much."""
    if judged is None:
        return (
            "No images were kept out of the folds, so that nothing can tell whether the average of the models "
            "is better than one; --test 0.2 keeps some."
        )
    auc = judged["auc"]
    difference = auc["difference"]
    sure = not math.isnan(difference["low"])
    interval = f" [{difference['low']:+.3f}, {difference['high']:+.3f}]" if sure else ""
    return (
        f"The average of the {judged['models']} models, on {judged['images']} images in no fold: "
        f"AUC {auc['ensemble']['value']:.3f}, a single model {auc['single']['value']:.3f}; "
        f"{difference['value']:+.3f}{interval}: {_say(judged)}."
    )


def _say(judged: dict[str, Any]) -> str:
    if math.isnan(judged["auc"]["difference"]["low"]):
        return "too few images or patients to tell"
    if judged["helped"]:
        return "it helped"
    return "it did harm" if judged["hurt"] else "that it helps is not shown"


def _compare_auc(outer: Answers, resamples: int) -> dict[str, Estimate]:
    scores, together = outer.scores(), outer.score_mean()
    return {
        "ensemble": mean_auc_of([together], resamples=resamples),
        "single": mean_auc_of(scores, resamples=resamples),
        "difference": paired_difference([(together, one) for one in scores], resamples=resamples),
    }


def _compare(outer: Answers, metric: Metric, resamples: int) -> dict[str, Estimate]:
    single = average(metric)

    def ensemble(probabilities: Floats, labels: Ints) -> float:
        return metric(probabilities.mean(1), labels)

    def difference(probabilities: Floats, labels: Ints) -> float:
        return ensemble(probabilities, labels) - single(probabilities, labels)

    metrics = {"ensemble": ensemble, "single": single, "difference": difference}
    return estimate(
        metrics, np.moveaxis(outer.probabilities, 0, 1), outer.labels, outer.groups, resamples=resamples
    )
