"""How a run computes: as it was begun, as given, as found here before, or as found by trying now."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import find_precision, make_fabric
from chanscale.errors import ArtifactError, one_line
from chanscale.learning import count_repeats
from chanscale.progress import Watcher
from chanscale.schedule import plan_epochs
from chanscale.speed.choice import Calibration, Choice
from chanscale.speed.other_work import OtherWork
from chanscale.speed.remembered import describe_processors, path_of, recall, remember
from chanscale.speed.steps import Draws, TrainingStep
from chanscale.speed.turns import Knobs, Turns, calibrate, describe_turns, find_faster
from chanscale.team import agree, is_main, team_size

SHORT = 60.0
"""Seconds that training must be estimated to take, or nothing is tried."""

FLEETING = SHORT / 6
"""Below this, that nothing was tried is not even noted: no machine is so uneven that another time it would be."""

SHARE, MOST = 0.03, 60.0
"""Of the estimated training, what trying may take; and seconds that it may take at most."""

BUSY = 0.25
"""Share of the processors that other work may take while speed is tried, before that is worth a word."""

AMPLE = 2
"""How many times faster than they are trained on images must be decoded, for more workers to be of no use."""

_log = logging.getLogger(__name__)


def recall_speed(notes: Mapping[str, Any], config: FitConfig) -> Calibration:
    """Return what an interrupted run had chosen, which it goes on with. Raises ArtifactError.

    What it had no choice of, in versions before there was one, is as it was then.
    """
    if "speed" not in notes:
        precision = notes.get("precision") or find_precision(config)
        return Calibration(
            chosen=Choice(precision=precision, workers=config.decoders), reason="begun without"
        )
    try:
        return Calibration.from_dict(notes["speed"])
    except ValueError as error:
        raise ArtifactError(
            f"cannot resume: the checkpoint does not say how the run computes ({one_line(error)[:100]}); "
            "delete its folder and fit again"
        ) from error


def settle_speed(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> Calibration:
    """Return how a new run is to compute; all processes of a job come to what the first one does.

    `model`: the classifier that it begins with, which is not changed.
    """
    start = Choice(precision=find_precision(config), workers=config.decoders)
    device = make_fabric(config).device
    if config.speed == "off":
        return agree(Calibration(chosen=start, reason="off"))
    if device.type not in ("cpu", "cuda"):
        return agree(Calibration(chosen=start, reason=f"nothing is tried on {device.type}"))
    facts = _state_facts(model, data, splits, config, device)
    found = agree(recall(facts) if is_main() else None)
    return found or _find(model, data, splits, config, watcher, start, facts)


def adopt(chosen: Choice, config: FitConfig) -> FitConfig:
    """Return `config` with what was chosen, and let PyTorch take so many threads from now on, but no more than it has.

    What is given is not chosen anew: workers of a run that is resumed may be others.
    """
    if chosen.threads is not None:
        torch.set_num_threads(min(chosen.threads, torch.get_num_threads()))
    own: dict[str, Any] = {"precision": chosen.precision}
    if config.workers is None and chosen.workers != config.decoders:
        own["workers"] = chosen.workers
    return config.model_copy(update=own)


def _find(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    start: Choice, facts: Mapping[str, Any],
) -> Calibration:  # fmt: skip
    others = OtherWork()
    step = TrainingStep(model, data, splits, config)
    typical = _warm_up(step.time, start)
    seconds = agree(typical / step.images * _count_images(splits, config) / team_size())
    if not math.isfinite(seconds):
        return agree(Calibration(chosen=start, reason="no step could be timed"))
    if seconds < SHORT:
        found = Calibration(chosen=start, reason=f"training of less than {SHORT:.0f} s: nothing was tried")
    else:
        watcher.on_step("trying what is fast", 0, 1)
        limit = min(MOST, SHARE * seconds)
        found = calibrate(
            step.time, start.model_copy(update={"threads": torch.get_num_threads()}), list_knobs(start, config, facts),
            images=step.images, typical=typical, limit=limit,
        )  # fmt: skip
        found = choose_workers(found, data, splits, config, limit=limit)
        watcher.on_step("trying what is fast", 1, 1)
    found = agree(found)
    if is_main() and seconds >= FLEETING:
        remember(facts, found)
        _warn_of(others, found, facts)
    return found


def _warn_of(others: OtherWork, found: Calibration, facts: Mapping[str, Any]) -> None:
    """Say so where other work had its part in what was `found`, which later runs will keep to."""
    share = others.share
    if found.measured and share > BUSY:
        _log.warning(
            "other work took %.0f %% of the processors while speed was tried, and what was found is kept; "
            "when it is over, remove %s to have it tried again", 100 * share, path_of(facts),
        )  # fmt: skip


def _state_facts(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, device: torch.device
) -> dict[str, Any]:
    """Return all that what is found follows from, besides what else the machine does."""
    return describe_processors(device) | {
        "network": config.backbone,
        "layers": sum(1 for _ in model.modules()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image": [data.channels, data.image_size],
        "micro_batch": config.micro_batch,
        "batch_size": config.batch_size,
        "trained_on": _count_images(splits, config),
        "precision": config.precision,
        "workers": config.workers,
        "processes": team_size(),
    }


def _warm_up(time_step: Callable[[Choice], float], start: Choice) -> float:
    """Return the seconds of a step, the first one left out: the less of two."""
    return min([time_step(start) for _ in range(3)][1:])


def _count_images(splits: Splits, config: FitConfig) -> int:
    """Return how often an image is trained on, down to the first budget."""
    epochs = sum(1 for _ in plan_epochs(config.model_copy(update={"tolerance": None})))
    return epochs * len(splits.train) * count_repeats(len(splits.train), config.batch_size)


def list_knobs(start: Choice, config: FitConfig, facts: Mapping[str, Any]) -> Knobs:
    """Return what is tried, in this order; without what is given."""
    knobs: dict[str, list[bool | int | str]] = {}
    if facts["gpu"] is None:
        if torch.get_num_threads() > 1:
            knobs["threads"] = _halve(torch.get_num_threads())
        if config.precision == "auto" and start.precision != "32-true":
            knobs["precision"] = ["32-true"]
    return knobs | {"channels_last": [False]}


def _halve(threads: int) -> list[bool | int | str]:
    """Return a half, a quarter and so on of `threads`, down to 1."""
    return [threads >> power for power in range(1, threads.bit_length())]


def choose_workers(
    found: Calibration, data: DecodedImages, splits: Splits, config: FitConfig, *, limit: float
) -> Calibration:
    """Return `found` with more workers, if images are decoded anew each time, and training would wait for them."""
    few = found.chosen.workers
    more = [few << power for power in range(1, 8) if few << power <= torch.get_num_threads()]
    if data.cached or config.workers is not None or found.rate is None or not more:
        return found
    draws = Draws(data, splits, config)
    typical = draws.time(few)
    if draws.images / typical >= AMPLE * found.rate:
        taken = {few: [typical]}
    else:
        taken = Turns(draws.time, typical=typical, limit=limit).take([few, *more])
    measured = describe_turns(taken, "workers", draws.images)
    chosen = found.chosen.model_copy(update={"workers": find_faster(taken) if taken else few})
    return found.model_copy(update={"chosen": chosen, "measured": (*found.measured, *measured)})
