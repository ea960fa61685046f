"""Fine-tuning, pruning by Taylor importance, fine-tuning again."""

import torch
from torch import Tensor

from chanscale.attaching import attach_scales
from chanscale.baselines.cutting import Importance, tune_cut_tune
from chanscale.baselines.fine_tuning import FineTuner, Trained, middle
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.group_scales import scale_parameters
from chanscale.learning import Learner
from chanscale.progress import Watcher

LEARNING_RATES = (3e-5, 1e-4, 3e-4)


def train_taylor(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` fine-tuned, cut to the budget by Taylor importance and fine-tuned again; a row for each epoch.

    One shot; after fine-tuning no removal is exact. Molchanov et al. 2017.
    """
    return tune_cut_tune(
        model, data, splits, config, watcher, rank=rank_by_taylor, lr=lr or middle(LEARNING_RATES)
    )


def rank_by_taylor(model: Classifier, learner: FineTuner) -> Importance:
    """Return the Taylor importance of the channels of `model`, which knows its groups and is not changed."""
    return taylor_importance(attach_scales(model, free_groups(model)), learner)


def taylor_importance(model: Classifier, learner: Learner) -> Importance:
    """Return how much the loss would change without each channel, to first order: |s dL/ds|, summed over batches.

    `model` has scales s; s dL/ds is activation times gradient, summed over the map and the images. Tied channels
    leave together, so theirs are summed before the absolute value is taken. Each group is divided by its root sum of
    squares (Molchanov et al. 2017, eq. 1 and 8), without which layers do not compare.
    """
    # In eval: on the statistics of the batch at hand the head would take no notice of the last layer's scales.
    model.eval().zero_grad()
    totals = {group.name: torch.zeros(group.width) for group in free_groups(model)}
    for done, batch in enumerate(learner.start_epoch(0)):
        learner.backward(model, batch, 0, done)
        for name, change in _changes(model).items():
            totals[name] += change.abs()
        model.zero_grad()
    return {name: total / total.norm().clamp_min(1e-30) for name, total in totals.items()}


def _changes(model: Classifier) -> dict[str, Tensor]:
    """Return s dL/ds of each channel, summed over the sites of its group."""
    scales = scale_parameters(model)
    changes = {}
    for group in free_groups(model):
        total = torch.zeros(group.width)
        for site in group.sites:
            scale = scales[site.layer]
            # A layer that this pass does not reach has no gradient.
            gradient = torch.zeros_like(scale) if scale.grad is None else scale.grad
            change = (scale.detach() * gradient).cpu()
            total.index_add_(0, torch.tensor(site.channels), change[list(site.positions)])
        changes[group.name] = total
    return changes
