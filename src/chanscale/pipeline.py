"""From images to a run folder: the steps, in order."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from chanscale.artifact import ModelInfo
from chanscale.backbones import Preprocessing
from chanscale.catalogue import require_network, require_weights
from chanscale.channels import carry_groups, free_groups
from chanscale.classifier import Classifier, assemble, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, split_images
from chanscale.decision_rules import require_support, settle_rules
from chanscale.depth import Depth, choose_depth, end_trunk
from chanscale.devices import join_team
from chanscale.errors import ChanscaleError, ConfigError, DataError, LostProcessError, WeightsError
from chanscale.files import is_file
from chanscale.folding import fold_grey
from chanscale.leaks.search import leaks_of_fit
from chanscale.modes import threads_given_back
from chanscale.originals import Original, open_original
from chanscale.progress import Watcher
from chanscale.proof import channel_groups
from chanscale.report_page.material import Material
from chanscale.run_figures import (
    describe_machine,
    describe_test,
    describe_training,
    evaluate_test,
    judge,
    judge_head,
    measure,
)
from chanscale.run_images import load_images
from chanscale.runs import FollowedFolder, RunFolder
from chanscale.speed.settling import adopt, recall_speed, settle_speed
from chanscale.state import Best, TrainingState
from chanscale.team import agree, alone, is_main, wait_for_all
from chanscale.training import fit, start
from chanscale.training_mode import require_same_layers

RARE = 5
"""How many times more images the commonest class has, from which on that is worth a word."""

MOST_SEARCHED = 5_000
"""Images among which twins are sought unasked: two minutes or so of alike ones (docs/benchmarks/leaks.md, Cost)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: the model, what its file says of it, its figures, a row for each epoch, and its folder."""

    model: Classifier
    info: ModelInfo
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    folder: Path | None


def scale_and_select(
    model: str | nn.Module,
    data: str | Path | ImageSet,
    *,
    config: FitConfig | None = None,
    preprocessing: Preprocessing | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> Run:
    """Turn a pretrained network and labelled images into a small classifier, and write a run folder to `out`.

    `model`: the name of a backbone, or of a library's network (`monai:DenseNet121`), or a network of your own for
    (N, 3, H, W), or for volumes (N, 1, D, H, W): a classifier, whose head is replaced, or a trunk. `preprocessing`:
    what it wants done to pixels in [0, 1]; default: what its source says, nothing for an object. `data`: a folder, CSV
    or npz file, or an `ImageSet`. The run lies beside `out` until it is whole; with `resume`, an interrupted one goes
    on. Raises ChanscaleError.
    """
    config, watcher = _name_network(model, preprocessing, config or FitConfig()), watcher or Watcher()
    folder = RunFolder.open(Path(out), config, resume=resume) if out is not None else None
    join_team(config)
    if not is_main():
        folder, watcher = folder and FollowedFolder(folder.out, config), Watcher()
        logging.getLogger("chanscale").setLevel(logging.ERROR)  # the first process warns for all
    try:
        with threads_given_back():
            return _run(model, preprocessing, data, config, folder, watcher)
    except LostProcessError:
        raise
    except ChanscaleError as error:
        if folder:
            _leave(folder, error, resumed=resume)
        raise
    finally:
        if folder:
            folder.release()


def _leave(folder: RunFolder, error: ChanscaleError, *, resumed: bool) -> None:
    """Leave nothing half-written, but throw away nothing that would help: what an earlier call had reached stays.

    So do the epochs of this call where images cannot be read, as when a share of files is away for a while.
    """
    if resumed:
        return
    if isinstance(error, DataError) and folder.has_epoch:
        _log.warning("the epochs so far are kept in %s; go on with --resume", folder.partial)
    else:
        folder.discard()


def _run(
    model: str | nn.Module,
    preprocessing: Preprocessing | None,
    data: str | Path | ImageSet,
    config: FitConfig,
    folder: RunFolder | None,
    watcher: Watcher,
) -> Run:
    began = perf_counter()
    images = load_images(data, config, watcher)
    if config.fold_grey and images.channels != 1:
        raise ConfigError("fold_grey is for grey images, and these have colour; leave it out")
    splits = agree(
        (folder.read_splits(images.images) if folder else None)
        or split_images(images.images, validation=config.validation, test=config.test, seed=config.seed)
    )
    require_support(config, images.images, splits.validation)
    warn_of_imbalance(config, images, splits)
    leaks = note_leaks(images, splits, watcher) if folder and is_main() else None
    original, classifier = open_classifier(
        model, images, splits, config, watcher, preprocessing=preprocessing
    )
    example, _ = images.batch(splits.train[:2])
    if config.fold_grey:
        fold_grey(classifier, example)  # fails now, rather than when all is trained
    if folder:
        folder.begin(images.images, splits)
    whole, depth = classifier, agree(folder.read_depth() if folder else None)
    depth = depth or agree(choose_depth(whole, images, splits, config, watcher))
    if folder:
        folder.note_depth(depth)
    classifier = end_trunk(whole, depth, example)
    info = describe_model(original, classifier, images, depth)
    state, notes = _load(folder, classifier)
    _require_same_original(original, notes)
    # Found once, so that both halves of an interrupted run compute alike.
    speed = (
        settle_speed(classifier, images, splits, config, watcher)
        if state is None
        else agree(recall_speed(notes, config))
    )
    config = adopt(speed.chosen, config)
    if speed.measured:
        watcher.on_finding(speed.describe())
    if state is None:
        state = start(classifier, images, splits, config)
        # With all scales at 1 and a linear head, what training starts from is the frozen network, as deep as it goes.
        notes = {
            "before": judge(state.model, images, splits, watcher)
            if classifier is whole
            else judge_head(whole, images, splits, config, watcher),
            "seconds": 0.0,
            "speed": speed.to_dict(),
            "original": _identify(original),
        }
    earlier, widest, full = notes["seconds"], widths(whole), original.full_parameters
    del whole, original  # what lies behind the depth is not needed any more

    def save(state: TrainingState) -> None:
        if folder:
            folder.save(state, notes | {"seconds": earlier + perf_counter() - began})

    best = fit(
        classifier, images, splits, config, state=state, watcher=watcher, save=save,
        channels_last=speed.chosen.channels_last,
    )  # fmt: skip
    if config.fold_grey:
        best = replace(best, model=fold_grey(best.model, images.batch(splits.validation[:2])[0]))
    calibrated, rules = settle_rules(
        best.model, images, splits, config, progress=partial(watcher.on_step, "calibrating")
    )
    best = replace(best, model=calibrated)
    info = replace(
        kept_by(best, info), operating_point=rules.operating_point, prediction_sets=rules.prediction_sets
    )
    judged = evaluate_test(best.model, images, splits, watcher)
    metrics = {
        **describe_test(judged, images, splits),
        **rules.judge(judged),
        "before": notes["before"],
        **measure(classifier, best, images, full=full),
        "depth": depth.to_dict(),
        **describe_training(best, state, images, splits),
        "images_from": "object" if isinstance(data, ImageSet) else "path",
        "leaks": leaks,
        "widths": widest,
        "seconds": round(earlier + perf_counter() - began, 1),
        "precision": speed.chosen.precision,
        "speed": speed.to_dict(),
        **describe_machine(),
    }
    if folder:
        with alone():  # the others have nothing left to compute
            info = folder.finish(
                Material(best.model, info, metrics, state.history, config, widest, images, splits, judged),
                progress=partial(watcher.on_step, "learning which images are usual"),
            )
        info = agree(info)
    elif info.rebuilt_by == "program":
        info = replace(info, rebuilt_by="network")  # no program was written
    return Run(best.model.eval(), info, metrics, state.history, folder.out if folder else None)


def _load(folder: RunFolder | None, classifier: Classifier) -> tuple[TrainingState | None, dict[str, Any]]:
    """Return the state and the notes of an interrupted run; all processes read them before one writes others."""
    found = folder.load(classifier) if folder and agree(folder.has_epoch) else None
    wait_for_all()
    return found or (None, {})


def warn_of_imbalance(config: FitConfig, images: DecodedImages, splits: Splits) -> None:
    """Say so when a class is so rare among the training images that it may never be the most probable one."""
    if config.balance:
        return
    strata, names = images.images.strata[np.asarray(splits.train)], images.images.classes
    counts = strata.sum(0)
    rarest = int(counts[: len(names)].argmin())
    if counts.max() < RARE * counts[rarest]:
        return
    has, what = ("have", "label") if images.images.is_multilabel else ("are", "class")
    never = "more probable than not" if images.images.is_multilabel else "the most probable one"
    positive = len(names) == 2 and rarest == 1 and not images.images.is_multilabel
    advice = "--sensitivity, which calls it more often" if positive else "--balance"
    _log.warning(
        "of %d training images, %d %s %s: a %s so rare may never be %s; consider %s",
        len(strata), counts[rarest], has, names[rarest], what, never, advice,
    )  # fmt: skip


def note_leaks(images: DecodedImages, splits: Splits, watcher: Watcher) -> dict[str, Any] | None:
    """Return the pairs of images beyond doubt that show one exposure, and warn of them.

    None for too many images, and for volumes.
    """
    if len(images) > MOST_SEARCHED or images.space is not None:
        return None
    figures, warning = leaks_of_fit(images, splits, watcher=watcher)
    if warning:
        frames = any(record.frame for record in images.images.records)
        _log.warning("%s; `chanscale leaks%s` names them", warning, " --frames all" if frames else "")
    return figures


def _name_network(model: object, preprocessing: object, config: FitConfig) -> FitConfig:
    """Return `config` with the name of the network; raise ConfigError, WeightsError before images are read."""
    if not isinstance(model, str | nn.Module):
        raise ConfigError(
            f"`model` must be the name of a network, or an nn.Module. Got {model!r:.80} instead."
        )
    if not isinstance(preprocessing, Preprocessing | None):
        raise ConfigError(
            f"`preprocessing` must be a chanscale.Preprocessing. Got {preprocessing!r:.80} instead."
        )
    if isinstance(model, str):
        require_network(model)
        if config.weights is not None and not is_file(config.weights):
            raise WeightsError(
                f"there is no file {config.weights}; name one with the weights of {model}, or none"
            )
        require_weights(model, config.weights)
        return config.model_copy(update={"backbone": model})
    if config.weights is not None:
        raise ConfigError("`weights` is for a network that is named; an object brings its own")
    return config.model_copy(update={"backbone": type(model).__name__})


def _require_same_original(original: Original, notes: dict[str, Any]) -> None:
    """Raise ConfigError when a run is resumed with another network, or another preprocessing."""
    begun, now = notes.get("original"), _identify(original)
    if begun is not None and begun != now:
        raise ConfigError(f"the run was begun with {begun}, not {now}; resume it with the same network")


def _identify(original: Original) -> dict[str, Any]:
    return {
        "name": original.name, "head": original.head, "preprocessing": original.preprocessing.to_dict(),
    }  # fmt: skip


def open_classifier(
    model: str | nn.Module,
    images: DecodedImages,
    splits: Splits,
    config: FitConfig,
    watcher: Watcher,
    *,
    preprocessing: Preprocessing | None = None,
) -> tuple[Original, Classifier]:
    """Return the network that `model` stands for, and it with a new head, knowing its channel groups."""
    example, _ = images.batch(splits.train[:2])
    original = open_original(
        model, example, preprocessing=preprocessing, weights=config.weights, progress=watcher.on_step
    )
    torch.manual_seed(config.seed)
    whole = assemble(
        original.preprocessing, original.trunk, example, classes=images.images.classes,
        multilabel=images.images.is_multilabel,
    )  # fmt: skip
    classifier = to_channels_last(whole)
    require_same_layers(classifier, example)
    watcher.on_step("finding channel groups", 0, 1)
    groups = channel_groups(classifier, example)
    watcher.on_step("finding channel groups", 1, 1)
    return original, carry_groups(classifier, groups)


def describe_model(
    original: Original, classifier: Classifier, images: DecodedImages, depth: Depth
) -> ModelInfo:
    """Return what the model file is to say about a network of which no channel is removed yet."""
    return ModelInfo(
        backbone=original.name,
        classes=images.images.classes,
        kept={name: list(range(width)) for name, width in widths(classifier).items()},
        preprocessing=original.preprocessing.to_dict(),
        image_size=images.image_size,
        channels=images.channels,
        head=original.head,
        without=depth.without,
        rebuilt_by="name" if original.can_be_rebuilt else "program",
        multilabel=images.images.is_multilabel,
        space=images.space,
        frames=images.images.frames,
    )


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of channels of each group of `model`."""
    return {group.name: group.width for group in free_groups(model)}


def kept_by(best: Best, info: ModelInfo) -> ModelInfo:
    """Return `info` with the channels that `best` kept, and its preprocessing."""
    preprocessing = best.model.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    kept = {name: indices.tolist() for name, indices in best.kept.items()}
    return replace(info, kept=kept, preprocessing=preprocessing.to_dict())
