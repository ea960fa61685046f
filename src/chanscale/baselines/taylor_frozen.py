"""Channels ranked once on the frozen network, by Taylor importance; then scales and head are trained."""

from chanscale.baselines.cutting import know_groups, make_target
from chanscale.baselines.fine_tuning import Trained, all_epochs, middle
from chanscale.baselines.refining import LEARNING_RATES, cut, refine
from chanscale.baselines.taylor import taylor_importance
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner
from chanscale.progress import Watcher
from chanscale.training import start


def train_taylor_frozen(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` cut to the budget before training, its scales and head trained, and a row for each epoch.

    Molchanov et al. 2017 rank as training goes; here the network is frozen, and once is all there is.
    """
    model = know_groups(model, data, splits)
    target = make_target(model, data, splits, config)
    state = start(model, data, splits, config)
    importance = taylor_importance(state.model, Learner(data, splits, config, watcher))
    state = cut(state, target.select(importance), data, splits, config)
    moments = all_epochs(config)
    return refine(
        state, target.cost, data, splits, config, watcher, moments=moments, lr=lr or middle(LEARNING_RATES)
    )
