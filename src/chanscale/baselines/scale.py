"""Scales on all channels: none of them is pressed, none is removed."""

from chanscale.baselines.cutting import know_groups
from chanscale.baselines.fine_tuning import Trained, all_epochs, middle
from chanscale.baselines.refining import LEARNING_RATES, refine
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.progress import Watcher
from chanscale.training import start


def train_scale(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` with trained scales and head, at its best epoch, and a row for each epoch.

    The scales sit where those of `fit` do, so that channels which cannot be removed have none. (IA)^3, Liu et al.
    2022, has vectors of the same kind in a transformer.
    """
    model = know_groups(model, data, splits)
    state = start(model, data, splits, config)
    cost = trunk_cost(model, free_groups(model), data.batch(splits.train[:1])[0])
    moments = all_epochs(config)
    return refine(
        state, cost, data, splits, config, watcher, moments=moments, lr=lr or middle(LEARNING_RATES)
    )
