"""How far probabilities can be believed: their figures on images whose classes are known.

Several labels of an image, (N, K), are as many questions of two answers. Where none is known, a figure is nan.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.metrics import Estimate, Floats, Ints, Metric, as_pairs, estimate

Array = NDArray[np.float64]

BINS = 10
"""Of the calibration error, with as many images in each as can be."""
LEAST = 1e-7
"""What a probability counts as at least in the NLL: fp32 cannot tell 1 less this from 1."""


def negative_log_likelihood(probabilities: Floats, labels: Ints) -> float:
    """Mean of -ln of the probability of the true class (NLL), in nats; below 1e-7 a probability counts as that."""
    probabilities, labels = as_pairs(probabilities, labels)
    if not len(labels):
        return float("nan")
    true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(true.clip(LEAST, 1)).mean())


def brier_score(probabilities: Floats, labels: Ints) -> float:
    """Mean squared distance of probabilities from the truth (Brier 1950); for two classes, of the positive one."""
    probabilities, labels = as_pairs(probabilities, labels)
    if not len(labels):
        return float("nan")
    truth = np.eye(probabilities.shape[1])[labels]
    squares = (probabilities.astype(np.float64) - truth) ** 2
    return float(np.mean(squares[:, 1] if probabilities.shape[1] == 2 else squares.sum(1)))


def calibration_error(probabilities: Floats, labels: Ints) -> float:
    """Mean distance of what is said from what is right, over ten bins of as many images each (ECE).

    Of what is said, `said_and_right` tells. Bins of equal width hold few images where few lie, and the error of a bin
    of few is mostly chance: equal mass is less biased (Roelofs et al. 2022), and not without bias either. Chance pushes
    it up, as gaps have no sign, and a bootstrap draw adds chance of its own: its interval may lie wholly above it.
    """
    said, right = said_and_right(probabilities, labels)
    if not len(said):
        return float("nan")
    # By value, so that images of the same probability share a bin, and their order does not matter.
    edges = np.quantile(said, np.arange(1, BINS) / BINS)
    gaps = np.bincount(np.searchsorted(edges, said), said - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(said))


def said_and_right(probabilities: Floats, labels: Ints) -> tuple[Array, Array]:
    """Return (N,) what was said, and 1 where it was so, else 0.

    It is the probability of the positive class where there are two, else that of the most probable class. Of several
    labels, it is that of each one known.
    """
    probabilities, labels = as_pairs(probabilities, labels)
    if probabilities.shape[1] == 2:
        return probabilities[:, 1].astype(np.float64), (labels == 1).astype(np.float64)
    return probabilities.max(1).astype(np.float64), (probabilities.argmax(1) == labels).astype(np.float64)


CALIBRATION: dict[str, Metric] = {
    "nll": negative_log_likelihood, "ece": calibration_error, "brier": brier_score,
}  # fmt: skip


def judge_calibration(probabilities: Floats, labels: Ints, groups: NDArray[Any]) -> dict[str, Estimate]:
    """Return `nll`, `ece` and `brier` with their intervals, over `groups` (N,)."""
    return estimate(CALIBRATION, probabilities, labels, groups)
