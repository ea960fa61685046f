"""A linear head on frozen features."""

import copy

from chanscale.baselines.fine_tuning import Trained, mark_chosen
from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner
from chanscale.progress import Watcher


def train_head(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> Trained:
    """Return a copy of `model` with a logistic regression for a head, and a row for each penalty tried."""
    learner = Learner(data, splits, config, watcher)
    probed = to_channels_last(copy.deepcopy(model)).to(learner.fabric.device)
    tried = learner.fit_head_anew(probed)
    learner.centre(probed)
    return probed, mark_chosen(tried)
