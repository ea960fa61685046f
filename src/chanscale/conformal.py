"""Split-conformal prediction sets: the classes that cannot be ruled out, with a stated rate of errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from chanscale.errors import ConfigError
from chanscale.metrics import Floats, Ints, Metric

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]

MARGIN = 1e-3
"""Of a logit: how far a bound lies below the probability that it is taken from, so that rounding loses no image."""
_ROUNDING, _NOTHING = 1e-9, 1e-30


@dataclass(frozen=True)
class PredictionSets:
    """Which classes may be that of an image: each whose probability is at least its bound, and the most probable one.

    `coverage`: the share of images of each class whose set is to hold it. `least`: the bound of each class, `images`:
    the validation images of each, both in the order of the classes.
    """

    coverage: Rate
    least: tuple[Share, ...]
    images: tuple[int, ...]

    def contain(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Return which classes are in the set of each image, (N, K), from its probabilities (N, K)."""
        # An empty set would tell a reader nothing; to fill it can but raise the coverage.
        most_probable = np.eye(probabilities.shape[1], dtype=bool)[probabilities.argmax(1)]
        held: NDArray[np.bool_] = (probabilities >= np.array(self.least)) | most_probable
        return held

    def metrics(self) -> dict[str, Metric]:
        """Return `coverage`, `size`, and `coverage_<k>` of the images of class k, by name."""
        of_classes = {f"coverage_{k}": partial(self._cover_class, k) for k in range(len(self.least))}
        return {"coverage": self._cover, "size": self._size, **of_classes}

    def _cover(self, probabilities: Floats, labels: Ints) -> float:
        return float(self.contain(probabilities)[np.arange(len(labels)), labels].mean())

    def _cover_class(self, k: int, probabilities: Floats, labels: Ints) -> float:
        chosen = labels == k
        return self._cover(probabilities[chosen], labels[chosen]) if chosen.any() else float("nan")

    def _size(self, probabilities: Floats, labels: Ints) -> float:
        del labels
        return float(self.contain(probabilities).sum(1).mean())


def find_prediction_sets(probabilities: Floats, labels: Ints, coverage: float) -> PredictionSets:
    """Return the sets that validation images give: class by class, the conformal bound of its own probability.

    The score of Sadinle et al. 2019 (LAC), 1 - the probability of the true class, with the quantile of finite samples
    (Angelopoulos & Bates 2021) for each class by itself (Mondrian; Vovk et al. 2005): one quantile for all would let
    a rare class be missed often, as long as the common one makes up for it. The promise holds for images that are
    independent, as those of one patient are not. `probabilities` (N, K), `labels` (N,). Raises ConfigError where a
    class has too few images.
    """
    counts = np.bincount(labels, minlength=probabilities.shape[1]).tolist()
    require_enough(counts, coverage)
    own = [np.sort(probabilities[labels == k, k])[::-1] for k in range(len(counts))]
    least = [
        just_below(float(scores[rank_of(coverage, count) - 1]))
        for scores, count in zip(own, counts, strict=True)
    ]
    return PredictionSets(coverage, tuple(least), tuple(counts))


def require_enough(counts: Sequence[int], coverage: float) -> None:
    """Raise ConfigError unless each class has the validation images that a `coverage` takes."""
    fewest, needed = min(counts), fewest_for(coverage)
    if fewest < needed:
        most = math.floor(100 * fewest / (fewest + 1)) / 100  # rounded down: what is proposed must do
        within = f"ask for {most:.2f} at most, or " if most else ""
        raise ConfigError(
            f"coverage={coverage:g} takes {needed} validation images of each class, and one has {fewest}; "
            f"{within}set more aside (validation)"
        )


def rank_of(share: float, count: int) -> int:
    """Return k such that a new score reaches the k-th largest of `count` with a probability of `share` at least.

    That is ceil(share (count + 1)), if all scores are exchangeable; above `count` where these are too few.
    """
    return max(1, math.ceil(share * (count + 1) - _ROUNDING))


def fewest_for(share: float) -> int:
    """Return the fewest scores of which one is low enough for `share`."""
    return max(1, math.ceil(share / (1 - share) - _ROUNDING))


def just_below(probability: float) -> float:
    """Return a probability whose logit is a thousandth less; of one too small to matter, 0."""
    if probability < _NOTHING:
        return 0.0
    inside = min(probability, 1 - 1e-7)
    return 1 / (1 + math.exp(MARGIN) * (1 - inside) / inside)
