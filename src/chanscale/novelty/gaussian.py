"""How far rows lie from the training rows: a Gaussian whose small directions are pooled."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

Floats = NDArray[np.floating[Any]]

AXES = 32
"""Directions that have a variance of their own, at most; the others share one."""

DEAD = 1e-6
"""A column that varies less than this share of the liveliest one says nothing but rounding, and is left out."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over columns (C,): `mean` (C,), `scale` (C,) 1 / deviation, or 0 for a column that is left out.

    Of the scaled columns: `axes` (K, C), their `variances` (K,), and `rest`, that of all other directions. With few
    images, their own covariance cannot be told; this one is that of probabilistic PCA (Tipping & Bishop 1999, eq. 8).
    """

    mean: Floats
    scale: Floats
    axes: Floats
    variances: Floats
    rest: float

    @classmethod
    def fit(cls, rows: Floats) -> Self:
        """Return the Gaussian of rows (N, C), N of 3 or more."""
        mean, deviation = rows.mean(0), rows.std(0)
        alive = deviation > DEAD * deviation.max()
        scale = np.where(alive, 1 / np.where(alive, deviation, 1), 0)
        count = min(AXES, max(1, int(alive.sum()) - 1), len(rows) // 3)
        pca = PCA(count, svd_solver="full").fit((rows - mean) * scale)
        rest = max(float(pca.noise_variance_), DEAD)
        return cls(mean, scale, pca.components_, np.maximum(pca.explained_variance_, DEAD), rest)

    def distance(self, rows: Floats) -> Floats:
        """Return ln of the squared Mahalanobis distance of rows (N, C), shape (N,)."""
        scaled = (rows - self.mean) * self.scale
        along = scaled @ self.axes.T
        beside = np.maximum((scaled**2).sum(1) - (along**2).sum(1), 0)
        distance: Floats = np.log((along**2 / self.variances).sum(1) + beside / self.rest + DEAD)
        return distance
