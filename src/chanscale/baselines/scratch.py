"""From scratch: the same network, its weights drawn at random, all of them trained."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from chanscale.baselines.fine_tuning import FineTuner, Trained, all_epochs, middle, trunk_part
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.errors import ModelError
from chanscale.progress import Watcher

LEARNING_RATES = (3e-4, 1e-3, 3e-3)


def train_scratch(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return a network like `model`, trained from random weights, at its best epoch, and a row for each epoch.

    It has as many epochs as the others, which is few for it. Raises ModelError where weights cannot be drawn anew.
    """
    tuner = FineTuner(model, data, splits, config, watcher)
    fresh = tuner.copy(model)
    draw_weights(fresh.trunk, seed=config.seed)
    return tuner.tune(fresh, all_epochs(config), [trunk_part(fresh, lr or middle(LEARNING_RATES))])


def draw_weights(model: nn.Module, *, seed: int) -> None:
    """Draw all weights of `model` anew, in place; norms forget their statistics.

    Raises ModelError when a layer does not know how its weights are drawn: they would stay pretrained.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif list(module.parameters(recurse=False)):
                raise ModelError(
                    f"the weights of {name or 'the trunk'} ({type(module).__name__}) cannot be drawn anew: it has no "
                    "reset_parameters. Give it one, or leave scratch out"
                )
            if isinstance(module, _ConvNd):
                _draw_convolution(module)


def _draw_convolution(layer: _ConvNd) -> None:
    # He et al. 2015: the variance survives a deep network without norms, which torch's own default lets fade.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
