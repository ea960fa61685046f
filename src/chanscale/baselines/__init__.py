"""The other ways to use a pretrained network on few images; all train on the same batches as `fit`."""

from collections.abc import Callable

from chanscale.baselines import (
    bias,
    full,
    last_block,
    magnitude,
    refining,
    scratch,
    slimming,
    taylor,
)
from chanscale.baselines.best_layer import train_best_layer
from chanscale.baselines.bias import train_bias
from chanscale.baselines.fine_tuning import Trained
from chanscale.baselines.full import train_full
from chanscale.baselines.head import train_head
from chanscale.baselines.last_block import train_last_block
from chanscale.baselines.magnitude import train_magnitude
from chanscale.baselines.our_channels import OurChannels
from chanscale.baselines.random_channels import train_random
from chanscale.baselines.scale import train_scale
from chanscale.baselines.scratch import train_scratch
from chanscale.baselines.select_only import train_select_only
from chanscale.baselines.slimming import train_slimming
from chanscale.baselines.taylor import train_taylor
from chanscale.baselines.taylor_frozen import train_taylor_frozen

BASELINES: dict[str, Callable[..., Trained]] = {
    "head": train_head,
    "best-layer": train_best_layer,
    "last-block": train_last_block,
    "full": train_full,
    "scratch": train_scratch,
    "scale": train_scale,
    "bias": train_bias,
    "random": train_random,
    "select-only": train_select_only,
    "taylor-frozen": train_taylor_frozen,
    "magnitude": train_magnitude,
    "taylor": train_taylor,
    "slimming": train_slimming,
}
"""Each takes (classifier, data, splits, config, watcher) and returns a trained classifier and its history.

Those of LEARNING_RATES also take `lr`, those of ON_OUR_CHANNELS what is `found`. The row of the history that is
`chosen` is that of the classifier returned.
"""

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "last-block": last_block.LEARNING_RATES,
    "full": full.LEARNING_RATES,
    "scratch": scratch.LEARNING_RATES,
    "scale": refining.LEARNING_RATES,
    "bias": bias.LEARNING_RATES,
    "random": refining.LEARNING_RATES,
    "taylor-frozen": refining.LEARNING_RATES,
    "magnitude": magnitude.LEARNING_RATES,
    "taylor": taylor.LEARNING_RATES,
    "slimming": slimming.LEARNING_RATES,
}
"""Three to choose from by validation; the middle one is the default. `head`, `best-layer` and `select-only` choose the
penalty of their linear head themselves."""

ON_OUR_CHANNELS = frozenset({"random", "select-only"})
"""Methods that begin with a fit of ours, or with the channels that one found on the same images."""

BUDGETED = ON_OUR_CHANNELS | {"taylor-frozen", "magnitude", "taylor", "slimming"}
"""Methods that cut the network to the budget."""

__all__ = [
    "BASELINES",
    "BUDGETED",
    "LEARNING_RATES",
    "ON_OUR_CHANNELS",
    "OurChannels",
    "train_best_layer",
    "train_bias",
    "train_full",
    "train_head",
    "train_last_block",
    "train_magnitude",
    "train_random",
    "train_scale",
    "train_scratch",
    "train_select_only",
    "train_slimming",
    "train_taylor",
    "train_taylor_frozen",
]
