"""The probability from which on an image is called positive, chosen for a sensitivity."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from chanscale.conformal import Rate, Share, fewest_for, just_below, rank_of
from chanscale.errors import ConfigError
from chanscale.metrics import Floats, Ints, Metric

FEW = 5
"""Images on which a threshold may not rest without a word."""

Count = Annotated[int, Field(gt=0)]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class OperatingPoint:
    """An image is called positive when the probability of the second class is `threshold` or more.

    `sensitivity`: the share of positive images that this is to find. `positives`: those among the validation images,
    of which the `rests_on` lowest set the threshold: the last one above it, and those that it misses.
    """

    threshold: Share
    sensitivity: Rate
    positives: Count
    rests_on: Count

    def call(self, probabilities: Floats) -> Flags:
        """Return which images are called positive, (N,), from their probabilities (N, 2)."""
        called: Flags = probabilities[:, 1] >= self.threshold
        return called

    def metrics(self) -> dict[str, Metric]:
        """Return sensitivity, specificity, PPV and NPV at the threshold, by name; a share of nothing is nan."""
        shares: dict[str, Callable[[Flags, Flags], float]] = {
            "sensitivity": lambda called, positive: _share(called, positive),
            "specificity": lambda called, positive: _share(~called, ~positive),
            "ppv": lambda called, positive: _share(positive, called),
            "npv": lambda called, positive: _share(~positive, ~called),
        }
        return {name: partial(self._judge, share) for name, share in shares.items()}

    def _judge(self, share: Callable[[Flags, Flags], float], probabilities: Floats, labels: Ints) -> float:
        return share(self.call(probabilities), labels == 1)

    @property
    def doubt(self) -> str | None:
        """What to say where the validation images hardly support the sensitivity, or None."""
        needed, lowest = fewest_for(self.sensitivity), _count(self.rests_on)
        if self.positives < needed:
            return (
                f"a sensitivity of {self.sensitivity:g} takes {needed} positive validation images, and there are "
                f"{self.positives}: the threshold is the lowest of them, and promises less"
            )
        if self.rests_on < FEW:
            return (
                f"with {self.positives} positive validation images, the threshold for a sensitivity of "
                f"{self.sensitivity:g} rests on {lowest}: on other images expect another"
            )
        return None


def find_operating_point(probabilities: Floats, labels: Ints, sensitivity: float) -> OperatingPoint:
    """Return the threshold that reaches `sensitivity` on validation images: a conservative order statistic.

    Of n positive images, the one of rank ceil(sensitivity (n + 1)) from the top, so that a new one reaches it with
    that probability at least; where n is too small for that, the lowest. That holds for images that are independent,
    as those of one patient are not. `probabilities` (N, 2), `labels` (N,). Raises ConfigError without positive images,
    or for other than two classes.
    """
    positives = int((labels == 1).sum())
    require_positives(probabilities.shape[1], positives)
    scores = np.sort(probabilities[labels == 1, 1])
    missed = max(0, positives - rank_of(sensitivity, positives))
    return OperatingPoint(just_below(float(scores[missed])), sensitivity, positives, missed + 1)


def require_positives(classes: int, positives: int) -> None:
    """Raise ConfigError unless there are two classes, and positive images among those of validation."""
    if classes != 2:
        raise ConfigError(f"sensitivity is for two classes, and there are {classes}; leave it out")
    if not positives:
        raise ConfigError("sensitivity takes positive validation images, and there are none; set more aside")


def _share(part: Flags, whole: Flags) -> float:
    return float(part[whole].mean()) if whole.any() else float("nan")


def _count(images: int) -> str:
    return "the lowest of them alone" if images == 1 else f"the {images} lowest of them alone"
