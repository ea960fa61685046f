"""A linear head on frozen features: where scaling starts, and the baseline to beat."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from chanscale.classifier import Classifier
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.loading import BatchLoader, DecodedImages, Progress
from chanscale.errors import TrainingError
from chanscale.heads import standardise
from chanscale.metrics import Floats, Ints
from chanscale.team import Portion

STRENGTH = 0.01
"""Inverse L2 strength: with 512 features and some hundred images, weak fits separate everything and learn nothing."""


def fit_probe(model: Classifier, data: DecodedImages, indices: Sequence[int], *, batch_size: int = 8) -> None:
    """Set the head of `model`, in place, to a logistic regression on its features of the images at `indices`."""
    features, labels = pooled_features(model, data, indices, batch_size=batch_size)
    fit_head(model, features, labels)


def fit_head(model: Classifier, features: Tensor, labels: Tensor, *, c: float = STRENGTH) -> None:
    """Set the head of `model`, in place, to a logistic regression on standardised `features` (N, C).

    `labels`: (N,), or (N, K) of several labels, each with a regression on the images where it is known. `c`: inverse
    strength of the L2 penalty, as in scikit-learn. Raises TrainingError when a feature is not finite.
    """
    if not features.isfinite().all():
        raise TrainingError(
            "the features of the network are not finite; use --precision 32-true, or other weights"
        )
    head = model.head
    head.set_statistics(features.to(head.mean.device))
    standardised = standardise(features, head.mean.cpu(), head.variance.cpu()).numpy()
    weight, bias = _fit_linear(standardised, labels.numpy(), c=c)
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(weight))
        head.linear.bias.copy_(torch.from_numpy(bias))


def _fit_linear(features: Floats, labels: Ints, *, c: float) -> tuple[Floats, Floats]:
    """Return the weights (outputs, C) and intercepts (outputs,) of logistic regressions."""
    if labels.ndim == 1:
        fitted = regress(features, labels, c=c)
        return fitted.coef_, fitted.intercept_
    each = [regress(features[own != UNKNOWN], own[own != UNKNOWN], c=c) for own in labels.T]
    return np.concatenate([one.coef_ for one in each]), np.concatenate([one.intercept_ for one in each])


def regress(features: Floats, labels: Ints, *, c: float = STRENGTH) -> LogisticRegression:
    """Return a logistic regression on standardised `features` (N, C) and `labels` (N,)."""
    return LogisticRegression(C=c, max_iter=2000).fit(features.astype(np.float64), labels)


def set_head_statistics(
    model: Classifier, data: DecodedImages, indices: Sequence[int], *, batch_size: int = 8
) -> None:
    """Set the head's statistics, in place, to those of its features on the images at `indices`."""
    features, _ = pooled_features(model, data, indices, batch_size=batch_size)
    model.head.set_statistics(features.to(model.head.mean.device))


@torch.no_grad()
def pooled_features(
    model: Classifier,
    data: DecodedImages,
    indices: Sequence[int],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the head's pooled features (N, C), in fp32 on the CPU, and the labels (N,) or (N, K) of some images.

    Of several processes, each computes a share of them.
    """
    model.eval()
    device = model.head.mean.device
    portion = Portion(indices)
    own, features = portion.own, []
    for done, batch in enumerate(BatchLoader(data, own, batch_size=batch_size).epoch()):
        if progress:
            progress(done * batch_size, len(own))
        features.append(model.head.pool(model.feature_map(batch.images.to(device))))
    if progress:
        progress(len(own), len(own))
    return portion.gather(torch.cat(features)).cpu(), data.labels[list(indices)]
