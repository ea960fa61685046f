"""Scores that are high for unusual images, each by another view: facts, grey levels, appearance, detail, features."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from chanscale.novelty.facts import COLUMNS, FACTS, SHAPE
from chanscale.novelty.gaussian import Floats, Gaussian
from chanscale.novelty.thumbnails import MIRRORED, TURNS, undo
from chanscale.novelty.traits import Traits

ALWAYS = ("pixels", "appearance", "turned", "mirrored")
"""The views that every detector has."""
LEAST = 0.02
"""The least step of the tail of a view: of ln of a squared distance."""


@dataclass(frozen=True)
class Views:
    """What is usual, by the training images: Gaussians, and the range of each of the `FACTS`, `low` and `high` (F,).

    `spectrum` is None in a file of an older version, `features` for a program.
    """

    pixels: Gaussian
    appearance: Gaussian
    spectrum: Gaussian | None
    features: Gaussian | None
    low: Floats
    high: Floats

    @classmethod
    def fit(cls, traits: Traits) -> Self:
        """Return the views of training images."""
        features = Gaussian.fit(traits.features) if traits.features.shape[1] else None
        told = single_facts(traits)
        pixels = Gaussian.fit(traits.facts[:, : len(COLUMNS)])
        appearance, spectrum = Gaussian.fit(traits.thumbnails), Gaussian.fit(traits.spectra)
        return cls(pixels, appearance, spectrum, features, told.min(0), told.max(0))

    @property
    def names(self) -> tuple[str, ...]:
        """The views whose scores follow those of the facts."""
        spectrum = () if self.spectrum is None else ("spectrum",)
        features = () if self.features is None else ("features", "together")
        return (*ALWAYS, *spectrum, *features)

    @property
    def handicap(self) -> Floats:
        """What is taken off the surprise of each score, (D,): together, the single facts count as one view."""
        count = 2 * len(FACTS)
        return np.array([np.log(count)] * count + [0.0] * len(self.names))

    @property
    def least(self) -> Floats:
        """The least step of the tail of each score, (D,)."""
        steps = [fact.step for fact in FACTS]
        return np.array([*steps, *steps, *(LEAST for _ in self.names)])

    def scores(self, traits: Traits) -> Floats:
        """Return (N, D): of each fact how little and how much there is, then the views in the order of `names`."""
        told = single_facts(traits)
        pixels = self.pixels.distance(traits.facts[:, : len(COLUMNS)])
        appearance = self.appearance.distance(traits.thumbnails)
        turned, mirrored = (
            undo(turns, traits.thumbnails, self.appearance).max(1) for turns in (TURNS, MIRRORED)
        )
        views = [pixels, appearance, turned, mirrored]
        if self.spectrum is not None:
            views.append(self.spectrum.distance(traits.spectra))
        if self.features is not None:
            features = self.features.distance(traits.features)
            views += [features, features + pixels]
        return np.concatenate([-told, told, np.stack(views, 1)], 1)


def single_facts(traits: Traits) -> Floats:
    """Return the columns (N, F) of the `FACTS`: of the pixels, then of the file."""
    inner = len(FACTS) - len(SHAPE)
    return np.concatenate([traits.facts[:, :inner], traits.facts[:, len(COLUMNS) :]], 1)
