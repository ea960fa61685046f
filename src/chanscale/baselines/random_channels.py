"""Random channels, as many of each group as scale-and-select leaves: what is its choice worth?"""

import torch

from chanscale.baselines.cutting import later_epochs
from chanscale.baselines.fine_tuning import Trained, middle
from chanscale.baselines.our_channels import OurChannels, find_our_channels
from chanscale.baselines.refining import LEARNING_RATES, cut, refine
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.progress import Watcher
from chanscale.selection import ChannelSelection, Widths
from chanscale.training import start


def train_random(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None, found: OurChannels | None = None,
) -> Trained:  # fmt: skip
    """Return `model` cut to random channels, its scales and head refined, and a row for each epoch of that.

    The depth and the widths are those that `fit` finds, which it is run for unless they are `found`; the epochs are
    those in which `fit` refines. Where channels of one group cost differently (they pass through a part of a layer),
    the budget is met nearly.
    """
    moments = later_epochs(config)
    shorter, ours = find_our_channels(model, data, splits, config, watcher, found=found)
    whole = {group.name: group.width for group in free_groups(shorter)}
    drawn = draw_channels(ours.widths, whole, seed=config.seed)
    state = cut(start(shorter, data, splits, config), drawn, data, splits, config)
    cost = trunk_cost(shorter, free_groups(shorter), data.batch(splits.train[:1])[0])
    return refine(
        state, cost, data, splits, config, watcher, moments=moments, lr=lr or middle(LEARNING_RATES)
    )


def draw_channels(widths: Widths, whole: Widths, *, seed: int) -> ChannelSelection:
    """Return so many channels of each group, as `widths` says, out of the `whole`, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return ChannelSelection(
        {
            name: torch.randperm(whole[name], generator=generator)[:width].sort().values
            for name, width in widths.items()
        }
    )
