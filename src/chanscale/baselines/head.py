"""A linear head on frozen features."""

import copy
from typing import Any

from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner
from chanscale.probe import fit_probe
from chanscale.progress import Watcher

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse L2 strengths that validation chooses from."""


def train_head(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> tuple[Classifier, list[dict[str, Any]]]:
    """Return a copy of `model` with a logistic regression for a head, its penalty chosen by validation."""
    learner = Learner(data, splits, config, watcher)
    tried = []
    for strength in STRENGTHS:
        candidate = to_channels_last(copy.deepcopy(model))
        fit_probe(candidate, data, splits.train, c=strength, batch_size=config.micro_batch)
        tried.append((candidate, {"c": strength, **learner.validate(candidate)}))
    best, _ = max(tried, key=lambda pair: pair[1]["validation_auc"])
    return best, [row for _, row in tried]
