"""Full fine-tuning: every weight is trained."""

from chanscale.baselines.fine_tuning import FineTuner, Trained, all_epochs, middle, trunk_part
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.progress import Watcher

LEARNING_RATES = (1e-5, 3e-5, 1e-4)


def train_full(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return a fine-tuned copy of `model`, at its best epoch by validation, and a row for each epoch."""
    tuner = FineTuner(model, data, splits, config, watcher)
    tuned = tuner.copy(model)
    return tuner.tune(tuned, all_epochs(config), [trunk_part(tuned, lr or middle(LEARNING_RATES))])
