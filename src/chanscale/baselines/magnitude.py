"""Fine-tuning, pruning by the magnitude of filters, fine-tuning again."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.baselines.cutting import Importance, tune_cut_tune
from chanscale.baselines.fine_tuning import FineTuner, Trained, middle
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.progress import Watcher

LEARNING_RATES = (3e-5, 1e-4, 3e-4)


def train_magnitude(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` fine-tuned, cut to the budget by the L1 norms of filters and fine-tuned again.

    A row for each epoch. One shot; after fine-tuning no removal is exact. Li et al. 2017.
    """
    return tune_cut_tune(
        model, data, splits, config, watcher, rank=rank_by_magnitude, lr=lr or middle(LEARNING_RATES)
    )


def rank_by_magnitude(model: Classifier, _learner: FineTuner) -> Importance:
    """Return the L1 norm of the filters that make each channel, divided by the mean of its group.

    Tied channels have several filters, whose norms are added. Li et al. 2017 choose a ratio for each layer; here
    groups compete, and are made comparable as in Torch-Pruning (`GroupMagnitudeImportance`, normalizer `mean`).
    """
    ranked = {}
    for group in free_groups(model):
        total = torch.zeros(group.width)
        for slot in group.outputs:
            layer = model.get_submodule(slot.layer)
            if isinstance(layer, (_ConvNd, nn.Linear)):
                total.index_add_(0, torch.tensor(slot.channels), filter_norms(layer)[list(slot.positions)])
        ranked[group.name] = total / total.mean().clamp_min(1e-30)
    return ranked


def filter_norms(layer: _ConvNd | nn.Linear) -> Tensor:
    """Return the sum of the absolute weights of each output of `layer`, (outputs,)."""
    along = 1 if isinstance(layer, _ConvTransposeNd) and layer.groups == 1 else 0
    return layer.weight.detach().abs().transpose(0, along).flatten(1).sum(1).cpu()
