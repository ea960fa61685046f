"""Whether an image is unlike those that a model was trained on, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chanscale.classifier import Classifier
from chanscale.data.loading import DecodedImages, Progress
from chanscale.errors import ConfigError, ModelError
from chanscale.novelty.gaussian import Floats
from chanscale.novelty.reasons import give_reasons
from chanscale.novelty.tails import Tails
from chanscale.novelty.traits import Traits, read_traits
from chanscale.novelty.views import Views
from chanscale.programs import Program


@dataclass(frozen=True)
class Verdict:
    """What is said of one image.

    `score`: the share of images like the training images that are as unusual, so small for a novel one. `flagged`:
    whether it is at most the rate; `reasons`, in words, the strongest first, only then. `near_tie`: whether the two
    most probable classes are about as probable; of several labels, whether one is about as probable as not.
    """

    score: float
    flagged: bool
    reasons: tuple[str, ...]
    near_tie: bool

    @property
    def uncertain(self) -> bool:
        """Whether the model should abstain: the image is novel, or the answer a near tie."""
        return self.flagged or self.near_tie


@dataclass(frozen=True)
class Judgement:
    """The `probabilities` (N, K) of the model, and a verdict for each of the N images."""

    probabilities: NDArray[np.float32]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Detector:
    """Tells images that are unlike those which a model was trained on.

    `layers`: those watched. `usual` (N,), ascending: how surprising the most surprising score was of images that the
    views were not fitted on. `rate`: the wanted share of false alarms. `margin`: |p - 0.5| below it is a near tie, of
    any of several labels; of more than two classes, half the lead of the most probable one.
    """

    layers: tuple[str, ...]
    views: Views
    tails: Tails
    usual: Floats
    rate: float
    margin: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"`rate` must be above 0 and below 1, such as 0.05. Got rate={self.rate}.")
        if not 0 <= self.margin < 0.5:
            raise ConfigError(f"`margin` must be 0 or more and below 0.5. Got margin={self.margin}.")

    @property
    def threshold(self) -> float:
        """The surprise that an image must reach to be flagged."""
        least = int(
            self.rate * (len(self.usual) + 1) + 1e-9
        )  # how many of `usual` may be as surprising, and one
        return float(np.nextafter(self.usual[len(self.usual) - least], np.inf)) if least else np.inf

    def judge(
        self, model: Classifier | Program, data: DecodedImages, indices: Sequence[int] | None = None,
        *, progress: Progress | None = None,
    ) -> Judgement:  # fmt: skip
        """Run `model` over the images of `data` at `indices` (default: all), once, and judge each by itself.

        Raises ModelError for another model than the detector was fitted on.
        """
        indices = range(len(data)) if indices is None else indices
        traits = read_traits(model, self.layers, data, indices, progress=progress)
        return Judgement(traits.probabilities, self.judge_traits(traits, multilabel=model.multilabel))

    def judge_traits(self, traits: Traits, *, multilabel: bool = False) -> tuple[Verdict, ...]:
        """Return the verdict for each image whose traits were read; `multilabel`: each probability stands by itself."""
        if not len(traits):
            return ()
        self._require_fit(traits)
        surprise = self.tails.surprise(self.views.scores(traits)) - self.views.handicap
        scores = self.score(surprise.max(1))
        flagged = surprise.max(1) >= self.threshold
        reasons = give_reasons(self.views, traits, surprise, flagged, threshold=self.threshold)
        distance = np.abs(traits.probabilities - 0.5).min(1) if multilabel else lead(traits.probabilities) / 2
        ties = distance < self.margin
        told = zip(scores.tolist(), flagged.tolist(), reasons, ties.tolist(), strict=True)
        return tuple(Verdict(*verdict) for verdict in told)

    def score(self, surprise: Floats) -> Floats:
        """Return the conformal p-values of surprises (N,): Vovk et al. 2005, section 2.2."""
        above = len(self.usual) - np.searchsorted(self.usual, surprise, side="left")
        return (1 + above) / (1 + len(self.usual))

    def _require_fit(self, traits: Traits) -> None:
        wanted = 0 if self.views.features is None else len(self.views.features.mean)
        if traits.features.shape[1] != wanted:
            raise ModelError(
                f"this detector reads {wanted} channels, the model has {traits.features.shape[1]}; "
                "use the model that it was fitted on"
            )
        spectrum = self.views.spectrum
        if spectrum is not None and traits.spectra.shape[1] != len(spectrum.mean):
            raise ModelError(
                f"this detector reads {len(spectrum.mean)} parts of a spectrum, these images have "
                f"{traits.spectra.shape[1]}; use images of the size that it was fitted on"
            )


def lead(probabilities: NDArray[np.floating]) -> Floats:
    """Return how much more probable the most probable class is than the next, (N,)."""
    ordered = np.sort(probabilities, axis=1)
    return ordered[:, -1] - ordered[:, -2]
