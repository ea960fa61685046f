"""The other ways to use a pretrained network on few images; all train on the same batches as `fit`."""

from chanscale.baselines.full import train_full
from chanscale.baselines.head import train_head

BASELINES = {"head": train_head, "full": train_full}
"""Each takes (classifier, data, splits, config, watcher) and returns a trained classifier and its history."""

__all__ = ["BASELINES", "train_full", "train_head"]
