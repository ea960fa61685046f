"""The channels of scale-and-select without its scales: is selection itself worth something?"""

from chanscale.baselines.fine_tuning import Trained
from chanscale.baselines.head import train_head
from chanscale.baselines.our_channels import OurChannels, find_our_channels
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.progress import Watcher
from chanscale.pruning import prune_channels


def train_select_only(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, found: OurChannels | None = None,
) -> Trained:  # fmt: skip
    """Return the slices of `model` that `fit` keeps, with a linear head; a row for each strength of its penalty.

    `found`: what it keeps, where that is known; else `fit` is run for it.
    """
    shorter, ours = find_our_channels(model, data, splits, config, watcher, found=found)
    return train_head(prune_channels(shorter, ours), data, splits, config, watcher)
