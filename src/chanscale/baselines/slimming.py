"""Network slimming: L1 on the weights of batch norms while fine-tuning, pruning by them, fine-tuning again.

Liu et al. 2017 add the subgradient lambda * sign(gamma) and train by SGD, where a gamma feels the penalty if its
gradient is not well above lambda. Adam divides a gradient by its own size, and a subgradient of a fixed weight with
it: how much it presses would depend on how noisy the data are. So L1 acts behind each step, as soft-thresholding
(proximal; what decoupled weight decay is to L2), and is measured in steps of Adam: `pressure` of the learning rate, as
in `fit`. A gamma stays if its gradient agrees with itself more than that.

Their 160 epochs from scratch are a few hundred steps here, from pretrained gammas. So the penalty takes the mean
|gamma| off each of them in the course of the phase: nothing is left of a common one that no gradient holds. All lose
the same, as L1 has it: a large one that nothing holds stays large.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from chanscale.baselines.cutting import Importance, know_groups, tune_cut_tune
from chanscale.baselines.fine_tuning import FineTuner, Part, Trained, middle
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.learning import cosine
from chanscale.progress import Watcher
from chanscale.scaling import soft_threshold
from chanscale.schedule import Moment

LEARNING_RATES = (3e-5, 1e-4, 3e-4)


def train_slimming(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return `model` fine-tuned, cut to the budget by |gamma| and fine-tuned again; a row for each epoch.

    `lr`: of all weights but the gammas, whose own follows from the number of steps. Groups of channels that pass no
    batch norm stay whole. No removal is exact: even where gammas reach 0, biases stay. Raises ConfigError when no group
    passes one. Liu et al. 2017.
    """
    model = know_groups(model, data, splits)
    if not rank_by_gamma(model):
        raise ConfigError(
            "slimming ranks channels by the weights of batch norms, and the network has none; use magnitude or taylor"
        )
    return tune_cut_tune(
        model, data, splits, config, watcher,
        rank=lambda tuned, _: rank_by_gamma(tuned), lr=lr or middle(LEARNING_RATES), tune=tune_sparsely,
    )  # fmt: skip


def tune_sparsely(tuner: FineTuner, model: Classifier, moments: Sequence[Moment], lr: float) -> Trained:
    """Fine-tune `model` and press its gammas, in place; return its last epoch, and a row for each.

    The best epoch by validation would be one of those in which little has been pressed.
    """
    gammas = find_gammas(model)
    steps = len(moments) * len(tuner.train)
    step = mean_size(gammas) / sum(cosine(done / steps) for done in range(steps))
    others = [p for p in model.trunk.parameters() if not any(p is gamma for gamma in gammas)]
    # No decay: the penalty takes its place.
    parts = [Part(others, lr), Part(gammas, step / tuner.config.pressure, decay=0.0)]
    _, history = tuner.tune(model, moments, parts, press=lambda factor: shrink(gammas, factor * step))
    return model, history


@torch.no_grad()
def shrink(gammas: Sequence[nn.Parameter], step: float) -> None:
    """Soft-threshold the gammas, in place."""
    for gamma in gammas:
        gamma.copy_(soft_threshold(gamma, step))


def mean_size(gammas: Sequence[nn.Parameter]) -> float:
    """Return the mean |gamma| over all channels."""
    return float(torch.cat([gamma.detach() for gamma in gammas]).abs().mean())


def find_gammas(model: Classifier) -> list[nn.Parameter]:
    """Return the weights of the batch norms of `model` that channels pass which can be removed, each once."""
    layers = {slot.layer: None for group in free_groups(model) for slot in group.outputs}
    norms = [norm for norm in map(model.get_submodule, layers) if isinstance(norm, _BatchNorm)]
    return [norm.weight for norm in norms if isinstance(norm.weight, nn.Parameter)]


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
