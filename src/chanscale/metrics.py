"""Figures of merit from probabilities, with bootstrap intervals."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from chanscale.data.label_columns import UNKNOWN
from chanscale.errors import DataError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Metric = Callable[[Floats, Ints], float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval; nan where it is not defined."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return `value`, `low`, `high`."""
        return asdict(self)


def as_pairs(probabilities: Floats, labels: Ints) -> tuple[Floats, Ints]:
    """Return several labels (N, K) as questions of two answers, probabilities (M, 2) and labels (M,): those known.

    Labels (N,) of one class an image are that already, and come back as they are.
    """
    if labels.ndim == 1:
        return probabilities, labels
    known = labels != UNKNOWN
    return np.stack([1 - probabilities[known], probabilities[known]], axis=1), labels[known]


def name_answer(shares: Sequence[float] | Floats, classes: Sequence[str], *, multilabel: bool) -> str:
    """Return the most probable class; of several labels those more probable than not, as `effusion|mass`, or `none`."""
    if multilabel:
        return "|".join(name for name, share in zip(classes, shares, strict=True) if share > 0.5) or "none"
    return classes[int(np.argmax(shares))]


def mean_auc(probabilities: Floats, labels: Ints) -> float:
    """Area under the ROC curve; for more than two classes the mean of each against the rest.

    `probabilities` (N, K), `labels` (N,). nan when a class is missing. Of several labels (N, K), the mean over those
    of which there are images with and without; where a label is unknown, the image is left out for it.
    """
    if labels.ndim == 2:
        return _mean_auc_of(_decided(labels), probabilities, labels)
    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return float("nan")
    if classes == 2:
        return area_under_roc(probabilities[:, 1], labels == 1)
    return float(np.mean([area_under_roc(probabilities[:, k], labels == k) for k in range(classes)]))


def _decided(labels: Ints) -> list[int]:
    """Return which of several labels (N, K) some images have and some have not."""
    return [k for k, column in enumerate(labels.T) if {0, 1} <= set(column.tolist())]


def _mean_auc_of(several: Sequence[int], probabilities: Floats, labels: Ints) -> float:
    """Return the mean AUC of these labels; nan where one of them has no images with it, or none without."""
    return (
        float(np.mean([label_auc(probabilities, labels, label) for label in several]))
        if several
        else math.nan
    )


def tell_apart(labels: Ints, k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images (N,) are known to be of class `k` or not, and of those whether they are.

    `labels`: (N,), all of them known, or (N, K).
    """
    if labels.ndim == 1:
        return np.ones(len(labels), dtype=bool), labels == k
    known = labels[:, k] != UNKNOWN
    return known, labels[known, k] == 1


def label_auc(probabilities: Floats, labels: Ints, label: int) -> float:
    """Area under the ROC curve of one of several labels (N, K), over images where it is known; nan if all are alike."""
    known, positive = tell_apart(labels, label)
    if not 0 < positive.sum() < len(positive):
        return float("nan")
    return area_under_roc(probabilities[known, label], positive)


def area_under_roc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Share of pairs of a positive and a negative in which the positive scores higher; a tie counts half.

    `scores`, `positive`: (N,), with both kinds. By ranks (Mann & Whitney 1947; Hanley & McNeil 1982): scikit-learn's is
    the same number, and takes ten times as long, which thousands of bootstrap draws feel.
    """
    count = int(positive.sum())
    above = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def accuracy(probabilities: Floats, labels: Ints) -> float:
    """Share of images whose most probable class is theirs; of several labels, share of known ones that are right."""
    probabilities, labels = as_pairs(probabilities, labels)
    return float(np.mean(probabilities.argmax(1) == labels)) if len(labels) else float("nan")


def sensitivity(probabilities: Floats, labels: Ints) -> float:
    """Share of the positive images (class 1 of two) that are called positive, at probability 0.5."""
    return _share_called(probabilities, labels, 1)


def specificity(probabilities: Floats, labels: Ints) -> float:
    """Share of the negative images (class 0 of two) that are called negative, at probability 0.5."""
    return _share_called(probabilities, labels, 0)


def metrics_for(classes: int, *, multilabel: bool = False) -> dict[str, Metric]:
    """Return the figures that make sense for this many classes, by name."""
    common: dict[str, Metric] = {"auc": mean_auc, "accuracy": accuracy}
    if multilabel or classes > 2:
        return common
    return common | {"sensitivity": sensitivity, "specificity": specificity}


def label_metrics(classes: Sequence[str]) -> dict[str, Metric]:
    """Return the AUC of each of several labels, by its name."""
    return {name: partial(label_auc, label=label) for label, name in enumerate(classes)}


def estimate(
    metrics: Mapping[str, Metric],
    probabilities: Floats,
    labels: Ints,
    groups: NDArray[Any],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each metric with its 95 % percentile interval (Efron & Tibshirani 1993, ch. 13).

    Whole groups (patients) are drawn with replacement, since images of one patient are not independent.
    A draw that lacks a class is left out for the metrics it does not define; of several labels, one that lacks what
    the images have, with or without one of them, is for their mean AUC. Of one patient alone there is no interval.
    """
    if len(labels) == 0:
        raise DataError("there are no images to evaluate on; choose a test share above 0")
    several = len(np.unique(groups)) > 1
    draws = list(resample(groups, resamples, np.random.default_rng(seed))) if several else []
    if labels.ndim == 2 and metrics.get("auc") is mean_auc:
        # A mean over fewer labels would be another quantity.
        metrics = {**metrics, "auc": partial(_mean_auc_of, _decided(labels))}
    return {
        name: _interval(metric(probabilities, labels), [metric(probabilities[d], labels[d]) for d in draws])
        for name, metric in metrics.items()
    }


def resample(groups: NDArray[Any], resamples: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Yield draws of whole groups with replacement: the indices of what they hold, as often as they were drawn."""
    _, inverse = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(inverse == g) for g in range(inverse.max() + 1)]
    for _ in range(resamples):
        yield np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])


def _interval(value: float, draws: list[float]) -> Estimate:
    defined = np.asarray(draws)[~np.isnan(draws)]
    if np.isnan(value) or len(defined) == 0:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _share_called(probabilities: Floats, labels: Ints, k: int) -> float:
    called = probabilities.argmax(1)[labels == k]
    return float(np.mean(called == k)) if len(called) else float("nan")
