"""A linear head behind the layer that it reads best: what is the depth alone worth?"""

from chanscale.baselines.fine_tuning import Trained
from chanscale.baselines.head import train_head
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.depth import choose_depth, end_trunk
from chanscale.progress import Watcher


def train_best_layer(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> Trained:
    """Return `model`, as deep as `fit` uses it by default, with a linear head, and a row for each penalty tried.

    Nothing is removed, but where the budget leaves little, `fit` ends the trunk earlier, and so does this.
    """
    depth = choose_depth(model, data, splits, config.model_copy(update={"depth": "auto"}), watcher)
    return train_head(end_trunk(model, depth, data.batch(splits.train[:2])[0]), data, splits, config, watcher)
