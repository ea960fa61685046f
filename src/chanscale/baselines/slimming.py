"""Network slimming: L1 on the weights of batch norms while fine-tuning, pruning by them, fine-tuning again."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from chanscale.baselines.cutting import Importance, know_groups, tune_cut_tune
from chanscale.baselines.fine_tuning import Trained, middle
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.progress import Watcher

LEARNING_RATES = (3e-5, 1e-4, 3e-4)

SPARSITY = 1e-4
"""Weight of the L1 penalty, as in Liu et al. 2017."""


def train_slimming(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` fine-tuned, cut to the budget by |gamma| and fine-tuned again; a row for each epoch.

    Groups of channels that pass no batch norm stay whole. After fine-tuning no removal is exact: gammas come near 0,
    and biases stay. Raises ConfigError when no group passes one. Liu et al. 2017.
    """
    model = know_groups(model, data, splits)
    if not rank_by_gamma(model):
        raise ConfigError(
            "slimming ranks channels by the weights of batch norms, and the network has none; use magnitude or taylor"
        )
    return tune_cut_tune(
        model, data, splits, config, watcher,
        rank=lambda tuned, _: rank_by_gamma(tuned), lr=lr or middle(LEARNING_RATES), press=press_gammas,
    )  # fmt: skip


def press_gammas(model: Classifier) -> None:
    """Add the subgradient of SPARSITY |gamma| to the gradients of the batch norms of `model`."""
    for module in model.trunk.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.grad is not None:
            module.weight.grad += SPARSITY * module.weight.detach().sign()


def rank_by_gamma(model: Classifier) -> Importance:
    """Return the mean |gamma| of the batch norms that each channel passes; groups that pass none are left out."""
    ranked = {}
    for group in free_groups(model):
        total, count = torch.zeros(group.width), torch.zeros(group.width)
        for slot in group.outputs:
            layer = model.get_submodule(slot.layer)
            if isinstance(layer, _BatchNorm) and isinstance(layer.weight, nn.Parameter):
                channels = torch.tensor(slot.channels)
                total.index_add_(0, channels, layer.weight.detach().abs().cpu()[list(slot.positions)])
                count.index_add_(0, channels, torch.ones(len(channels)))
        if count.any():
            ranked[group.name] = total / count.clamp_min(1)
    return ranked
