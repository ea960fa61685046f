"""A linear head on frozen features."""

import copy

from chanscale.baselines.fine_tuning import Trained, mark_chosen
from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner, merit
from chanscale.probe import fit_head, pooled_features
from chanscale.progress import Watcher

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse L2 strengths that validation chooses from."""


def train_head(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> Trained:
    """Return a copy of `model` with a logistic regression for a head, and a row for each penalty tried."""
    learner = Learner(data, splits, config, watcher)
    probed = to_channels_last(copy.deepcopy(model)).to(learner.fabric.device)
    features, labels = pooled_features(probed, data, splits.train, batch_size=config.micro_batch)
    tried = []
    for strength in STRENGTHS:
        fit_head(probed, features, labels, c=strength)
        tried.append({"c": strength, **learner.validate(probed)})
    fit_head(probed, features, labels, c=max(tried, key=merit)["c"])
    learner.centre(probed)
    return probed, mark_chosen(tried)
