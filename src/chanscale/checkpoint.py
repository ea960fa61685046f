"""Save a run after each epoch, and read it back to go on as if nothing had happened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chanscale.artifact import read_tensors, write_tensors
from chanscale.attaching import attach_scales
from chanscale.channels import carried_groups
from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.errors import ArtifactError, ChanscaleError, EmptySelectionError, one_line
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from chanscale.state import Best, TrainingState, make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(state: TrainingState, notes: Mapping[str, Any], path: Path) -> None:
    """Write all of `state` to one safetensors file; `notes` is what else the caller wants back, as plain values."""
    tensors = _prefixed("model", state.model.state_dict())
    for index, parameter in enumerate(_parameters(state.optimizer)):
        for key, value in state.optimizer.state.get(
            parameter, {}
        ).items():  # none where there was no gradient
            tensors[f"moments.{index}.{key}"] = value.detach()
    story: dict[str, Any] = {
        "epoch": state.epoch, "scale_lr": state.scale_lr, "history": state.history, "kept": _lists(state.kept),
    }  # fmt: skip
    for name, best in (("candidate", state.candidate), ("best", state.best)):
        if best is not None:
            tensors |= _prefixed(name, best.model.state_dict())
            story[name] = {"kept": _lists(best.kept), "row": best.row}
    write_tensors(path, tensors, {"story": story, "notes": dict(notes)})


def load_checkpoint(
    path: Path, config: FitConfig, *, whole: Classifier
) -> tuple[TrainingState, dict[str, Any]]:
    """Return the state and the notes that were saved.

    `whole`: the classifier that the run began with; it carries its groups. Raises ArtifactError for a missing or
    damaged file.
    """
    try:
        tensors, metadata = read_tensors(path)
        return _restore_state(tensors, metadata["story"], config, whole), metadata["notes"]
    except (ChanscaleError, RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ArtifactError(
            f"cannot resume from {path} ({reason}); delete its folder and fit again"
        ) from error


def _restore_state(
    tensors: dict[str, Tensor], story: dict[str, Any], config: FitConfig, whole: Classifier
) -> TrainingState:
    model = _restore("model", story["kept"], tensors, whole)
    optimizer = make_optimizer(model, config)
    for index, parameter in enumerate(_parameters(optimizer)):
        if f"moments.{index}.step" in tensors:
            optimizer.state[parameter] = {key: tensors[f"moments.{index}.{key}"] for key in MOMENTS}
    found = {
        name: Best(
            _restore(name, story[name]["kept"], tensors, whole),
            _tensors(story[name]["kept"]),
            story[name]["row"],
        )
        for name in ("candidate", "best")
        if name in story
    }
    return TrainingState(
        model=model, optimizer=optimizer, kept=_tensors(story["kept"]), epoch=story["epoch"],
        scale_lr=story["scale_lr"], history=story["history"], **found,
    )  # fmt: skip


def _restore(
    name: str, kept: dict[str, list[int]], tensors: dict[str, Tensor], whole: Classifier
) -> Classifier:
    scaled = attach_scales(whole, carried_groups(whole) or ())
    try:
        model = prune_channels(scaled, ChannelSelection(_tensors(kept)))
    except EmptySelectionError:  # no channel had been removed yet
        model = scaled
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(state, assign=True)
    return to_channels_last(model)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in tensors.items()}


def _lists(kept: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in kept.items()}


def _tensors(kept: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(indices) for name, indices in kept.items()}
