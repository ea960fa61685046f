"""A detector, fitted on the training images of a run; how much is usual is told by images that it was not fitted on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from chanscale.classifier import Classifier
from chanscale.data.loading import DecodedImages, Progress
from chanscale.data.splits import Splits
from chanscale.errors import DataError
from chanscale.novelty.detector import Detector
from chanscale.novelty.tails import Tails, cross_surprise
from chanscale.novelty.traits import Traits, find_layers, read_traits
from chanscale.novelty.views import Views
from chanscale.programs import Program

MOST = 2000
"""Training images that are read at most, at even distances; and as many of validation."""

FOLDS = 10
FEW = 12
"""Training images from which nothing can be told."""


def fit_novelty(
    model: Classifier | Program, data: DecodedImages, splits: Splits,
    *, rate: float = 0.05, margin: float = 0.05, progress: Progress | None = None,
) -> Detector:  # fmt: skip
    """Return a detector fitted on the training images, in one pass over these and those of validation.

    `rate`: the share of images like them that may be flagged. The test images are not looked at. Raises DataError where
    there are too few images or patients to keep that rate, and for volumes.
    """
    if data.space is not None:
        raise DataError("a novelty detector is for pictures, and these are volumes")
    train, validation = (_thin(side) for side in (splits.train, splits.validation))
    layers = find_layers(model, data.batch([0])[0])
    traits = read_traits(model, layers, data, [*train, *validation], progress=progress)
    groups = data.images.group_keys[np.array([*train, *validation])]
    fitted = np.arange(len(groups)) < len(train)
    return fit_traits(traits, fitted, groups, layers=layers, rate=rate, margin=margin)


def fit_traits(
    traits: Traits, fitted: NDArray[np.bool_], groups: NDArray[np.str_],
    *, layers: Sequence[str] = (), rate: float = 0.05, margin: float = 0.05,
) -> Detector:  # fmt: skip
    """Return a detector fitted on the images where `fitted` (N,); the others only tell what is usual.

    `groups` (N,): patients, of whom none is to be on both sides of a fold. Raises DataError.
    """
    _require_enough(fitted, groups, rate)
    folds = draw_folds(groups)
    views = Views.fit(traits.of(fitted))
    scores = views.scores(traits)
    for fold in np.unique(folds):
        own = fitted & (folds == fold)
        if own.any():
            scores[own] = Views.fit(traits.of(fitted & ~own)).scores(traits.of(own))
    usual = np.sort((cross_surprise(scores, views.least, folds) - views.handicap).max(1))
    return Detector(tuple(layers), views, Tails.fit(scores, views.least), usual, rate, margin)


def draw_folds(groups: NDArray[np.str_]) -> NDArray[np.intp]:
    """Return the fold of each image, (N,), so that images of a group are in one."""
    folds = np.zeros(len(groups), dtype=np.intp)
    splitter = GroupKFold(min(FOLDS, len(np.unique(groups))))
    for fold, (_, own) in enumerate(splitter.split(groups, groups=groups)):
        folds[own] = fold
    return folds


def _require_enough(fitted: NDArray[np.bool_], groups: NDArray[np.str_], rate: float) -> None:
    patients, wanted = len(np.unique(groups[fitted])), int(np.ceil(1 / rate)) - 1
    if fitted.sum() < FEW or patients < 3:
        raise DataError(
            f"a novelty detector needs {FEW} training images of 3 patients. Got {fitted.sum()} of {patients}."
        )
    if len(fitted) < wanted:
        raise DataError(
            f"with rate={rate}, a novelty detector needs {wanted} images to train and validate on. "
            f"Got {len(fitted)}; add images, or allow more false alarms."
        )


def _thin(side: Sequence[int]) -> Sequence[int]:
    return side[:: -(-len(side) // MOST)] if side else side
