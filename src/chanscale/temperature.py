"""Temperature scaling: one number that makes probabilities milder or bolder, and no ranking other (Guo et al. 2017)."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from chanscale.classifier import Classifier
from chanscale.data.label_columns import UNKNOWN
from chanscale.metrics import Floats, Ints

Array = NDArray[np.float64]

HIGHEST = 10.0
"""A temperature lies between 1 / 10 and 10."""
FEWEST = 20
"""Validation images that it takes to find one."""


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by. `value` 1 changes nothing.

    `reason`: why it is 1, where none was looked for or found; or that it is at a bound.
    `images`: the validation images that it was found on; `nll_before`, `nll_after`: theirs, in nats.
    """

    value: float
    images: int
    reason: str | None = None
    nll_before: float | None = None
    nll_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, the value as `temperature`."""
        fields = asdict(self)
        return {"temperature": fields.pop("value"), **fields}


NOT_ASKED = Temperature(1.0, 0, "it was not asked for")


def find_temperature(logits: Floats, labels: Ints) -> Temperature:
    """Return the temperature between 0.1 and 10 that minimises the NLL of validation images.

    `logits` (N, 1) of the second of two classes, or (N, K); `labels` (N,). Of several labels (N, K), all share one, and
    each known one is an answer of its own; an image counts where one is known. The NLL is convex in 1 / T, so that the
    minimum is the root of its slope, the same each time. It stays 1 with fewer than 20 images, and where all are
    right: then no T is best, as the NLL falls for ever when T does. `reason` also tells of a T at a bound.
    """
    count = len(labels)
    if labels.ndim == 2:
        known = labels != UNKNOWN
        count = int(known.any(1).sum())
        logits, labels = logits[known][:, None], labels[known]
    if count < FEWEST:
        return Temperature(1.0, count, f"{FEWEST} validation images are needed, and there are {count}")
    columns = _with_all_classes(logits)
    others = np.where(np.eye(columns.shape[1], dtype=bool)[labels], -np.inf, columns).max(1)
    if (columns[np.arange(len(labels)), labels] > others).all():
        return Temperature(1.0, count, "all validation images are right, which leaves no best temperature")
    value, before = 1 / _find_inverse(columns, labels), _nll(columns, labels)
    after = _nll(columns / value, labels)
    if after > before:  # by rounding, where 1 is as good as it gets
        value, after = 1.0, before
    inside = 1 / HIGHEST < value < HIGHEST
    reason = (
        None
        if inside
        else f"it is the bound of those looked at, {1 / HIGHEST:g} to {HIGHEST:g}: trust it little"
    )
    return Temperature(value, count, reason, before, after)


@torch.no_grad()
def fold_temperature(model: Classifier, temperature: float) -> Classifier:
    """Return a copy of `model` whose logits are divided by `temperature`: weights and bias of its head are."""
    folded = copy.deepcopy(model)
    for parameter in folded.head.linear.parameters():
        parameter.div_(temperature)
    return folded


def _with_all_classes(logits: Floats) -> Array:
    """Return logits (N, K) in fp64; of two classes, the first has 0."""
    columns = logits.astype(np.float64)
    return np.hstack([np.zeros_like(columns), columns]) if columns.shape[1] == 1 else columns


def _find_inverse(logits: Array, labels: Ints) -> float:
    def slope(inverse: float) -> float:
        """Return the derivative of the NLL by 1 / T."""
        expected = (softmax(inverse * logits, axis=1) * logits).sum(1)
        return float((expected - logits[np.arange(len(labels)), labels]).mean())

    low, high = 1 / HIGHEST, HIGHEST
    if slope(low) >= 0:
        return low
    return high if slope(high) <= 0 else float(brentq(slope, low, high, xtol=1e-12))


def _nll(logits: Array, labels: Ints) -> float:
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())
