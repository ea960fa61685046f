"""What scale-and-select finds on a training set, for the methods that are about its channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from chanscale.baselines.cutting import know_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.depth import Depth, choose_depth, end_trunk
from chanscale.progress import Watcher
from chanscale.selection import ChannelSelection
from chanscale.training import fit


@dataclass(frozen=True)
class OurChannels:
    """Where scale-and-select ends the trunk, and the channels that it leaves of that at the budget."""

    depth: Depth
    selection: ChannelSelection

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the channels of a run: `depth`, of its metrics, and `kept`, of its model."""
        kept = {name: torch.tensor(indices, dtype=torch.long) for name, indices in values["kept"].items()}
        return cls(Depth.from_dict(values["depth"]), ChannelSelection(kept))


def find_our_channels(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, found: OurChannels | None = None,
) -> tuple[Classifier, ChannelSelection]:  # fmt: skip
    """Return `model` as deep as scale-and-select uses it, and the channels that it leaves of that at the budget.

    The network knows its groups. `found`: what a fit on the same images found already; else one is run for it.
    """
    at_budget = config.model_copy(update={"tolerance": None})
    depth = found.depth if found else choose_depth(model, data, splits, at_budget, watcher)
    shorter = know_groups(end_trunk(model, depth, data.batch(splits.train[:2])[0]), data, splits)
    if found is None:
        return shorter, ChannelSelection(fit(shorter, data, splits, at_budget, watcher=watcher).kept)
    return shorter, found.selection
