"""What a run carries from one epoch to the next."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.group_scales import scale_parameters


@dataclass(frozen=True)
class Best:
    """The best epoch of a stage by validation: its model, the original indices it kept, its row of history."""

    model: Classifier
    kept: dict[str, Tensor]
    row: dict[str, Any]


@dataclass
class TrainingState:
    """All that changes as a run goes on: to save it is enough to resume.

    `kept`: each group's indices into the original network, shape (width,). `scale_lr`: learning rate of the
    scales while they shrink. `candidate`: the best epoch of the stage under way; `best`: that of the last
    stage that was accepted.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    kept: dict[str, Tensor]
    epoch: int = 0
    scale_lr: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    candidate: Best | None = None
    best: Best | None = None

    @property
    def models(self) -> list[Classifier]:
        """The network in training, and those that are kept of it."""
        return [self.model, *(kept.model for kept in (self.candidate, self.best) if kept)]


def move_state(state: TrainingState, device: torch.device) -> None:
    """Move the models and the optimizer's moments of `state` to `device`, in place."""
    for model in state.models:
        model.to(device)
    for moments in state.optimizer.state.values():
        # Adam counts its steps on the CPU.
        moments.update({key: value.to(device) for key, value in moments.items() if key != "step"})


def make_optimizer(model: Classifier, config: FitConfig) -> torch.optim.Adam:
    """Return Adam over the scales and the head, in this order, and freeze all else.

    No weight decay on the scales: it would shrink the useful ones with the rest.
    """
    model.requires_grad_(False)
    scales, head = list(scale_parameters(model).values()), list(model.head.parameters())
    for parameter in scales + head:
        parameter.requires_grad_(True)
    return torch.optim.Adam([{"params": scales}, {"params": head}], lr=config.head_lr)
