"""How sure the figures of a comparison are: intervals over folds, and paired differences over test images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from chanscale.metrics import Estimate, Floats, Ints

_AT_ONCE = 100  # draws that are counted at a time, which keeps the memory small


@dataclass(frozen=True)
class Scores:
    """What a cell said of its test images: `probabilities` (N, K), `labels` (N,), `groups` and `names` (N,)."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: Ints
    probabilities: Floats

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Self:
        """Return the scores in the result of a cell."""
        test = result["test"]
        return cls(
            tuple(test["names"]), tuple(test["groups"]), np.array(test["labels"]), np.array(test["scores"])
        )


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and its 95 % t interval; of one, without an interval. nan are left out."""
    defined = np.array([value for value in values if not math.isnan(value)])
    if len(defined) < 2:
        return Estimate(float(defined[0]) if len(defined) else math.nan, math.nan, math.nan)
    half = stats.t.ppf(0.975, len(defined) - 1) * defined.std(ddof=1) / math.sqrt(len(defined))
    mean = float(defined.mean())
    return Estimate(mean, mean - float(half), mean + float(half))


def paired_difference(
    pairs: Sequence[tuple[Scores, Scores]], *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return the AUC of the first of each pair less that of the second, with its 95 % bootstrap interval.

    Both of a pair scored the same images. Each pair has AUCs of its own, since scores of two models have no common
    scale; the difference is their mean. Patients are drawn from all test images together, and one that was tested in
    several cells counts alike in all. The interval knows of other patients, not of other trainings. nan where no
    pair has every class; of one patient alone there is no interval.
    """
    if not pairs:
        return Estimate(math.nan, math.nan, math.nan)
    index = {group: place for place, group in enumerate(sorted({g for one, _ in pairs for g in one.groups}))}
    members = [np.array([index[group] for group in one.groups]) for one, _ in pairs]
    value = _differences(pairs, members, np.ones((1, len(index))))
    if len(index) < 2:
        return Estimate(float(value[0]), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = [
        _differences(pairs, members, rng.multinomial(len(index), np.full(len(index), 1 / len(index)), count))
        for count in np.diff([*range(0, resamples, _AT_ONCE), resamples])
    ]
    drawn = np.concatenate(draws)
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
    return Estimate(float(value[0]), float(low), float(high))


def weighted_auc(probabilities: Floats, labels: Ints, weights: NDArray[Any]) -> Floats:
    """Return `mean_auc` when image i counts `weights[d, i]` times, (D,); nan where a class is missing.

    `probabilities` (N, K), `labels` (N,), `weights` (D, N).
    """
    classes = probabilities.shape[1]
    judged = [1] if classes == 2 else range(classes)
    aucs = [_auc(probabilities[:, k], labels == k, weights) for k in judged]
    mean: Floats = np.mean(aucs, axis=0)
    return mean


def _differences(
    pairs: Sequence[tuple[Scores, Scores]], members: Sequence[Ints], counts: NDArray[Any]
) -> Floats:
    """Return the mean difference of the pairs for each draw, (D,), from how often it has each group, (D, G)."""
    each = np.array(
        [
            weighted_auc(one.probabilities, one.labels, counts[:, own])
            - weighted_auc(other.probabilities, other.labels, counts[:, own])
            for (one, other), own in zip(pairs, members, strict=True)
        ]
    )
    defined = ~np.isnan(each)
    with np.errstate(invalid="ignore"):  # a draw in which no pair has every class
        mean: Floats = np.where(defined, each, 0).sum(0) / defined.sum(0)
    return mean


def _auc(scores: Floats, positive: NDArray[np.bool_], weights: NDArray[Any]) -> Floats:
    """Return the weighted share of pairs, of a positive and another image, in right order; a tie is half of one."""
    order = np.argsort(scores, kind="stable")
    ranked, weights = scores[order], weights[:, order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    yes = np.add.reduceat(weights * positive[order], starts, axis=1)
    no = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    right = (yes * (no.cumsum(1) - no / 2)).sum(1)
    with np.errstate(invalid="ignore"):  # no image of one of the two
        auc: Floats = right / (yes.sum(1) * no.sum(1))
    return auc
