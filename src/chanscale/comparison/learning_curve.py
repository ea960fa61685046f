"""What more training images would bring, from the AUCs that a grid has on fewer: an inverse power law.

AUC(n) = a - b n^-c, with 0 <= a <= 1 and b, c >= 0 (Mukherjee et al. 2003, Figueroa et al. 2012).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar

from chanscale.comparison.table import Row, find
from chanscale.errors import ConfigError
from chanscale.metrics import Estimate

Array = NDArray[np.float64]

FEWEST_SIZES = 3
"""Numbers of training images that it takes: the law has three parameters."""
RESAMPLES = 500
FLATTEST, STEEPEST = 0.01, 4.0
"""Between them lies c, where the curve rises: one below is flat, and beyond it has become a step."""
_EXPONENTS = np.geomspace(FLATTEST, STEEPEST, 120)
_STEP = math.log(STEEPEST / FLATTEST) / 119
PRIOR = 2.0
"""Degrees of freedom by which the variance of each size is drawn to that of all: few cells tell little of their own."""

NOTES = (
    "Intervals, 95 %: cells of each size drawn again and the law fitted again. They suppose that the law holds beyond "
    "the sizes measured, and that more images come from the same place, with labels as good.",
    "Cells of one fold share their test patients, and those of different folds most of their training images: the "
    "intervals know little of other patients, and are too narrow.",
    "Of curves drawn from the law itself, with 3 to 8 cells of 5 sizes, these intervals held the truth in 82 to 93 %.",
    "A gain is the median of what each curve through cells drawn again rises from the largest size: medians do not "
    "subtract, and it is no difference of two AUCs told.",
    "The law cannot fall: no gain is ever below 0, even where more images would bring nothing.",
    "A few sizes fit many laws. Far from the largest size it is a guess: Figueroa et al. 2012 could foretell within "
    "a few percent only what lay near the sizes measured.",
)


@dataclass(frozen=True)
class Point:
    """The AUCs of the cells that were trained on about `images` images."""

    images: float
    aucs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return float(np.mean(self.aucs))


@dataclass(frozen=True)
class Law:
    """AUC(n) = a - b n^-c."""

    a: float
    b: float
    c: float

    def at(self, images: float | Array) -> Any:
        """Return the AUC with this many training images, a number or an array."""
        return self.a - self.b * np.asarray(images, dtype=np.float64) ** -self.c


@dataclass(frozen=True)
class LearningCurve:
    """The law that fits `points` best, and those that fit them when their cells are drawn again."""

    points: tuple[Point, ...]
    law: Law
    draws: tuple[Law, ...]

    @property
    def most(self) -> float:
        """The largest number of training images that was measured."""
        return self.points[-1].images

    def at(self, images: float) -> Estimate:
        """Return the median AUC of the draws with this many training images, and their 95 % interval."""
        return _summarise([float(law.at(images)) for law in self.draws])

    def gain(self, times: float) -> Estimate:
        """Return what `times` as many images as were measured at most would bring, as `at` does."""
        return _summarise([float(law.at(times * self.most) - law.at(self.most)) for law in self.draws])

    @cached_property
    def missed(self) -> float | None:
        """How far the curve without the largest size misses it, in AUC; None where three sizes would not be left."""
        if len(self.points) <= FEWEST_SIZES:
            return None
        return float(fit_law(self.points[:-1]).at(self.most) - self.points[-1].mean)

    @property
    def is_flat(self) -> bool:
        """Whether the law that fits best does not rise: more images have brought nothing, or harm."""
        return self.law.b == 0 or self.law.c == 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers: `sizes`, `law`, `forecasts` for 2 and 4 times the images, `missed`, `flat`, `notes`."""
        sizes = [
            {"images": point.images, "cells": len(point.aucs), "auc": point.mean, "aucs": list(point.aucs)}
            for point in self.points
        ]
        names = ("a", "b", "c")
        spread = {name: _summarise([getattr(law, name) for law in self.draws]) for name in names}
        law = {name: spread[name].to_dict() | {"value": getattr(self.law, name)} for name in names}
        forecasts = [
            {
                "times": times, "images": round(times * self.most),
                "auc": self.at(times * self.most).to_dict(), "gain": self.gain(times).to_dict(),
            }
            for times in (2, 4)
        ]  # fmt: skip
        return {
            "sizes": sizes, "law": law, "flat": self.is_flat, "forecasts": forecasts, "missed": self.missed,
            "notes": list(NOTES),
        }  # fmt: skip


def find_points(rows: Sequence[Row], method: str) -> tuple[Point, ...]:
    """Return what the rows of a grid have of `method`, by number of training images. Raises ConfigError.

    A size is the mean over its cells, as all images are a few more or fewer in each fold.
    """
    own = [row for row in rows if row.method == method]
    if not own:
        names = ", ".join(dict.fromkeys(row.method for row in rows))
        raise ConfigError(f"--method must be one that the grid has, {names}. Got {method!r}.")
    found = [
        Point(
            row.mean("images", "train"),
            tuple(x for x in (find(r, "auc") for r in row.results) if x == x),
        )
        for row in own
    ]
    points = tuple(sorted((point for point in found if point.aucs), key=lambda point: point.images))
    _require_enough(points, method)
    return points


def fit_curve(points: Sequence[Point], *, resamples: int = RESAMPLES, seed: int = 0) -> LearningCurve:
    """Fit the law to the mean AUC of each size, by how sure it is, and again with cells drawn with replacement."""
    variances = _mean_variances(points)
    drawn = _draw_means(points, variances, resamples, np.random.default_rng(seed))
    return LearningCurve(tuple(points), fit_law(points), tuple(_fit_draws(points, drawn, 1 / variances)))


def fit_law(points: Sequence[Point]) -> Law:
    """Return the law that fits the mean AUC of each size best, by how sure it is."""
    means, weights = np.array([[point.mean for point in points]]), 1 / _mean_variances(points)

    def miss(log_c: float) -> float:
        return float(_regress(points, means, weights, np.exp([log_c]))[2][0, 0])

    near = math.log(_EXPONENTS[_regress(points, means, weights, _EXPONENTS)[2][0].argmin()])
    c = np.exp([minimize_scalar(miss, bounds=(near - _STEP, near + _STEP), method="bounded").x])
    a, b, _ = _regress(points, means, weights, np.clip(c, FLATTEST, STEEPEST))
    return _to_law(a[0, 0], b[0, 0], c[0])


def _require_enough(points: Sequence[Point], method: str) -> None:
    if len(points) < FEWEST_SIZES:
        raise ConfigError(
            f"a learning curve of {method} needs cells of {FEWEST_SIZES} numbers of training images, and the grid has "
            f"{len(points)}; run `chanscale compare` with more --sizes, such as 50,100,200,all"
        )
    few = [point for point in points if len(point.aucs) < 2]
    if few:
        raise ConfigError(
            f"a learning curve of {method} needs 2 cells of each size, and with {few[0].images:.0f} training images "
            "there is 1; run `chanscale compare` with more --folds or --seeds"
        )


def _mean_variances(points: Sequence[Point]) -> Array:
    """Return the variance of each mean AUC, (P,), each drawn to that of all sizes as cells are few."""
    degrees = np.array([len(point.aucs) - 1 for point in points], dtype=np.float64)
    own = np.array([np.var(point.aucs, ddof=1) if len(point.aucs) > 1 else 0 for point in points])
    pooled = float((degrees * own).sum() / max(degrees.sum(), 1))
    variances = (degrees * own + PRIOR * pooled) / (degrees + PRIOR)
    means: Array = np.maximum(variances, 1e-8) / (degrees + 1)  # cells that all agree still weigh something
    return means


def _draw_means(points: Sequence[Point], variances: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Return mean AUCs (D, P) of cells that are drawn with replacement within each size, spread as `variances` say.

    A bootstrap of m cells is too narrow by sqrt((m - 1) / m), and one of few is narrow or wide by chance. As the
    variances are known from few cells, all are as much wider as a t distribution is.
    """
    degrees = sum(len(point.aucs) - 1 for point in points)
    wider = stats.t.ppf(0.975, max(degrees, 1)) / stats.norm.ppf(0.975)
    drawn = []
    for point, wanted in zip(points, variances, strict=True):
        own = np.array(point.aucs) - point.mean
        found = math.sqrt(np.mean(own**2) / len(own))
        scale = wider * math.sqrt(wanted) / found if found > 0 else 0
        drawn.append(point.mean + scale * rng.choice(own, (resamples, len(own))).mean(1))
    return np.stack(drawn, axis=1)


def _fit_draws(points: Sequence[Point], drawn: Array, weights: Array) -> Iterator[Law]:
    """Yield the law nearest to each draw of `drawn` (D, P), its c among `_EXPONENTS`."""
    a, b, missed = _regress(points, drawn, weights, _EXPONENTS)
    for draw, best in enumerate(missed.argmin(1)):
        yield _to_law(a[draw, best], b[draw, best], _EXPONENTS[best])


def _regress(points: Sequence[Point], drawn: Array, weights: Array, c: Array) -> tuple[Array, Array, Array]:
    """Return a <= 1, b >= 0 and the weighted squares, each (D, C), of the best laws with exponents `c` (C,).

    With c given, the law is a line in n^-c, and the rest a linear regression; `drawn` (D, P), `weights` (P,).
    """
    falls = np.array([point.images for point in points]) ** -c[:, None]
    share = weights / weights.sum()
    centre, level = falls @ share, (drawn @ share)[:, None]
    around = falls - centre[:, None]
    b = np.maximum(-((drawn - level) * share @ around.T) / (around**2 @ share), 0)
    a = level + b * centre
    # Where the best a is above 1, it is 1, and the line goes through that end.
    steep = ((1 - drawn) * share @ falls.T) / (falls**2 @ share)
    b = np.where(a > 1, steep, b)
    a = np.minimum(a, 1)
    missed = (weights * (a[..., None] - b[..., None] * falls - drawn[:, None]) ** 2).sum(2)
    return a, b, missed


def _to_law(a: float, b: float, c: float) -> Law:
    return Law(float(a), float(b), float(c)) if b > 0 else Law(float(a), 0.0, 0.0)


def _summarise(values: Sequence[float]) -> Estimate:
    low, median, high = np.percentile(values, [2.5, 50, 97.5])
    return Estimate(float(median), float(low), float(high))
