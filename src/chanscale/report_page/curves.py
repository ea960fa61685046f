"""How good probabilities are, beyond the figures of metrics.json: ROC, calibration, confusion, every threshold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve

from chanscale.calibration import said_and_right
from chanscale.metrics import Floats, Ints, resample

Array = NDArray[np.float64]

GRID = np.linspace(0, 1, 101)
"""False positive rates at which a band is computed."""
BINS = 10
"""Of the calibration plot, of equal width."""
RESAMPLES = 1000
MOST_POINTS = 400
"""Of a curve that is drawn; more cannot be told apart."""
STEPS = 100
"""Thresholds that can be chosen, from 0 to 1."""


@dataclass(frozen=True)
class Roc:
    """A ROC curve: rates (M,) each, its area, and a pointwise 95 % band (101,) over false positive rates 0 to 1."""

    false_positive: Array
    true_positive: Array
    area: float
    low: Array
    high: Array


@dataclass(frozen=True)
class Bin:
    """Images whose probability lies in [low, high): how many, their mean probability, and how many were right.

    `share_low`, `share_high`: the 95 % interval of that share (Wilson 1927), as if the images were independent.
    """

    low: float
    high: float
    count: int
    mean: float
    share: float
    share_low: float
    share_high: float


@dataclass(frozen=True)
class Thresholds:
    """For two classes: how many of each are called positive, their probability being above 0, 0.01, ... 1."""

    true_positives: list[int]
    false_positives: list[int]
    positives: int
    negatives: int


@dataclass(frozen=True)
class Start:
    """For two classes: the threshold in use, and how many of each it calls positive, of how many."""

    threshold: float
    true_positives: int
    false_positives: int
    positives: int
    negatives: int


def find_roc(scores: Floats, positive: NDArray[np.bool_], groups: NDArray[Any]) -> Roc:
    """Return the ROC curve of `scores` (N,), where `positive` (N,), with a bootstrap band over `groups` (N,)."""
    false_positive, true_positive, _ = roc_curve(positive, scores)
    draws = [_read_curve(scores[drawn], positive[drawn]) for drawn in _with_both(positive, groups)]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0) if draws else np.full((2, len(GRID)), np.nan)
    area = float(auc(false_positive, true_positive))
    shown = np.unique(np.linspace(0, len(false_positive) - 1, MOST_POINTS).round().astype(int))
    return Roc(false_positive[shown], true_positive[shown], area, low, high)


def _with_both(positive: NDArray[np.bool_], groups: NDArray[Any]) -> Iterator[NDArray[np.intp]]:
    """Yield draws of whole groups that hold positive and negative images."""
    for drawn in resample(groups, RESAMPLES, np.random.default_rng(0)):
        if 0 < positive[drawn].sum() < len(drawn):
            yield drawn


def _read_curve(scores: Floats, positive: NDArray[np.bool_]) -> Array:
    """Return the true positive rate at each false positive rate of the grid."""
    order = np.sort(scores[~positive])[::-1]
    places = np.minimum((GRID * len(order) + 1e-9).astype(int), len(order) - 1)
    # The threshold that lets this share of the negative images through, and no more.
    called = np.searchsorted(np.sort(scores[positive]), order[places], side="right")
    rates: Array = 1 - called / positive.sum()
    rates[-1] = 1.0
    return rates


def find_bins(probabilities: Floats, labels: Ints) -> list[Bin]:
    """Return those of ten bins of equal width that hold images.

    They are of the positive class's probability where there are two, else of the most probable class's.
    """
    said, right = said_and_right(probabilities, labels)
    place = np.minimum((said * BINS).astype(int), BINS - 1)
    return [_bin(index, said[place == index], right[place == index]) for index in np.unique(place).tolist()]


def _bin(index: int, said: Array, right: Array) -> Bin:
    low, high = wilson(int(right.sum()), len(right))
    return Bin(
        index / BINS, (index + 1) / BINS, len(said), float(said.mean()), float(right.mean()), low, high
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, as Wilson 1927 has it."""
    z, share = 1.959964, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(0, middle - half)), float(min(1, middle + half))


def confusion(probabilities: Floats, labels: Ints) -> NDArray[np.int64]:
    """Return how many images of each class (rows) were called which (columns), (K, K); the most probable counts."""
    classes = probabilities.shape[1]
    counts = np.bincount(labels * classes + probabilities.argmax(1), minlength=classes * classes)
    return counts.reshape(classes, classes)


@dataclass(frozen=True)
class Called:
    """Of one of several labels, at a probability of 0.5: how many images with it, and without it, are called so."""

    name: str
    hits: int
    missed: int
    alarms: int
    passed: int


def count_labels(probabilities: Floats, labels: Ints, classes: Sequence[str]) -> list[Called]:
    """Return how each of several labels, (N, K), was called, over the images where it is known."""
    called = probabilities > 0.5
    return [
        Called(name, *(int(found.sum()) for found in (has & said, has & ~said, lacks & said, lacks & ~said)))
        for name, has, lacks, said in zip(classes, (labels == 1).T, (labels == 0).T, called.T, strict=True)
    ]


def count_called(called: NDArray[np.bool_], labels: Ints, threshold: float) -> Start:
    """Return how many of each class are `called` positive, (N,), at the threshold in use."""
    positive = labels == 1
    return Start(
        threshold, int(called[positive].sum()), int(called[~positive].sum()), int(positive.sum()),
        int((~positive).sum()),
    )  # fmt: skip


def find_thresholds(probabilities: Floats, labels: Ints) -> Thresholds:
    """Return what each threshold would come to, for two classes; at 0.5 it is the more probable class."""
    steps = np.arange(STEPS + 1) / STEPS
    scores = probabilities[:, 1].astype(np.float64)
    called = {label: _count_above(scores[labels == label], steps) for label in (0, 1)}
    return Thresholds(called[1], called[0], int((labels == 1).sum()), int((labels == 0).sum()))


def _count_above(scores: Array, steps: Array) -> list[int]:
    counts: list[int] = (len(scores) - np.searchsorted(np.sort(scores), steps, side="right")).tolist()
    return counts
