"""Biases alone are trained, those of convolutions and norms, and the head."""

from torch import nn

from chanscale.baselines.fine_tuning import FineTuner, Part, Trained, all_epochs, find_norms, middle
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.progress import Watcher

LEARNING_RATES = (1e-3, 1e-2, 1e-1)
"""Far apart: a bias is worth what the maps that it shifts are, in the hundreds (VGG16) or around 1 (behind norms)."""


def train_bias(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return a copy of `model` with its biases and head trained, at its best epoch, and a row for each epoch.

    Layers without a bias get none; norms keep their statistics. Raises ConfigError when no layer has one.
    BitFit, Ben Zaken et al. 2021.
    """
    tuner = FineTuner(model, data, splits, config, watcher)
    tuned = tuner.copy(model)
    # No decay: it would draw pretrained biases to 0.
    part = Part(find_biases(tuned.trunk), lr or middle(LEARNING_RATES), decay=0.0)
    return tuner.tune(tuned, all_epochs(config), [part], still=find_norms(tuned).values())


def find_biases(model: nn.Module) -> list[nn.Parameter]:
    """Return the biases of all layers of `model`. Raises ConfigError when there are none."""
    found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not found:
        raise ConfigError("no layer of the network has a bias to train; leave `bias` out")
    return found
