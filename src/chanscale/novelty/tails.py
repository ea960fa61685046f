"""How rare a score is, also beyond all that were seen."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chanscale.novelty.gaussian import Floats

SHARE = 0.1
"""Of the scores, those that make the tail."""


@dataclass(frozen=True)
class Tails:
    """The upper tails of D scores: `SHARE` of them exceed `start` (D,), and e times fewer with each `step` (D,) more.

    Ranks alone could not tell an image that is a little beyond all others from one that is far beyond.
    """

    start: Floats
    step: Floats

    @classmethod
    def fit(cls, scores: Floats, least: Floats) -> Self:
        """Return the tails of scores (N, D); no step is below `least` (D,)."""
        start = np.quantile(scores, 1 - SHARE, axis=0)
        beyond = np.maximum(scores - start, 0)
        excess = beyond.sum(0) / np.maximum((beyond > 0).sum(0), 1)
        return cls(start, np.maximum(excess, least))

    def surprise(self, scores: Floats) -> Floats:
        """Return -ln of the share of images that would score as high, for scores (N, D); 0 where they are usual."""
        surprise: Floats = np.maximum((scores - self.start) / self.step - np.log(SHARE), 0)
        return surprise


def cross_surprise(scores: Floats, least: Floats, folds: NDArray[np.integer[Any]]) -> Floats:
    """Return the surprise of each row of scores (N, D) by the tails of the other folds; `folds`: (N,)."""
    surprise = np.zeros_like(scores)
    for fold in np.unique(folds):
        own = folds == fold
        surprise[own] = Tails.fit(scores[~own], least).surprise(scores[own])
    return surprise
