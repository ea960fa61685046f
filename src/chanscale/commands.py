"""The commands: each reads its options, orders the steps, and shows what they came to.

Torch takes seconds to import, so a command imports what it needs when it runs, and `--help` stays quick.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chanscale import __version__, demo
from chanscale.cli_options import (
    ConfigFileOption,
    DataArgument,
    FramesOption,
    GroupOption,
    JsonOption,
    ResumeOption,
    RunArgument,
    SkipOption,
    merge_config,
    with_config_options,
)
from chanscale.config import FitConfig
from chanscale.display import (
    complain,
    describe_evaluation,
    describe_groups,
    describe_predictions,
    out,
    program,
    say,
    show_json,
    steps_of,
    watching,
)
from chanscale.errors import ConfigError, DataError, lacks_memory
from chanscale.followers import is_follower
from chanscale.wording import percent, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanscale.artifact import ModelInfo
    from chanscale.data import ImageSet
    from chanscale.pipeline import Run


class UnfinishedRun(Exception):  # noqa: N818
    """A run that can go on was stopped, by the user or because the system refused something; says which."""


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chanscale {__version__}")
        raise typer.Exit


@app.callback()
def chanscale(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a large pretrained CNN and a small labelled image set into a small, exact classifier.

    Research software: not a medical device, and no output of it is a diagnosis.
    """


@app.command()
@with_config_options
def fit(
    data: DataArgument,
    out_folder: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run folder to make.")],
    config_file: ConfigFileOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Scale, select and remove channels, and write a run folder.

    It holds the small classifier, its figures, the split, the history and the configuration.
    """
    config = merge_config(given, config_file)
    require_outside(data, out_folder)
    _show_run(_fit(data, out_folder, config, resume=resume), as_json=as_json)


@app.command()
def evaluate(
    run_folder: RunArgument,
    data: DataArgument,
    group_pattern: GroupOption = None,
    frames: FramesOption = None,
    skip_bad: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Judge a run on labelled images that it has not seen."""
    from functools import partial

    from chanscale.data import decode_images, open_images
    from chanscale.decision_rules import judge_rules
    from chanscale.ensemble import load_predictor
    from chanscale.evaluation import evaluate as judge

    model, info = load_predictor(run_folder)
    opening = partial(
        open_images, data, classes=info.classes, skip_bad=skip_bad, frames=info.choose_frames(frames),
        label_columns=info.label_columns,
    )  # fmt: skip
    given = group_pattern is not None
    images = opening(group_pattern=group_pattern or None) if given else _open_as_noted(run_folder, opening)
    images = _take_unseen(images, run_folder)
    warn_about_patients(images, group_pattern, "which makes the intervals too narrow")
    with watching() as watcher:
        decoded = decode_images(
            images,
            image_size=info.image_size,
            space=info.space,
            most_channels=info.most_channels,
            skip_bad=skip_bad,
            progress=steps_of(watcher, "decoding images"),
        )
        judged = judge(model, decoded, progress=steps_of(watcher, "evaluating"))
    _report_skipped(decoded.images.skipped)
    told = judged.to_dict() | judge_rules(judged, info.operating_point, info.prediction_sets)
    told |= _describe_judged(info, decoded.images)
    if as_json:
        show_json(told)
    else:
        out.print(describe_evaluation(told))


def _open_as_noted(run_folder: Path, opening: "Callable[..., ImageSet]") -> "ImageSet":
    """Return the images with the patients that the run's own pattern finds, where it finds one for every image."""
    from chanscale.artifact import model_path

    try:
        if pattern := FitConfig.read(model_path(run_folder).with_name("config.yaml")).group_pattern:
            images = opening(group_pattern=pattern)
            complain(f"patients are told by the run's own pattern, --group-pattern '{pattern}'; '' for none")
            return images
    except (ConfigError, DataError):  # it knows no pattern, or other names
        pass
    return opening(group_pattern=None)


def _describe_judged(info: "ModelInfo", images: "ImageSet") -> dict[str, Any]:
    """Return what the figures are of: the classes, the positive one and its threshold, and how many patients."""
    positive, threshold = (info.classes[1], 0.5) if info.is_binary else (None, None)
    return {
        "classes": list(info.classes), "positive": positive, "threshold": threshold,
        "patients": images.count_patients(),
    }  # fmt: skip


@app.command()
def predict(
    run_folder: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of images.")],
    table: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="CSV table to write, e.g. predictions.csv.")
    ] = None,
    abstain: Annotated[
        bool,
        typer.Option(
            "--abstain", help="Name no class for images unlike those of training, and for near ties."
        ),
    ] = False,
    frames: FramesOption = None,
    skip_bad: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which class a run sees in images, and how probably.

    Images that are unlike those of training are flagged, with the reason.
    """
    from chanscale.ensemble import load_predictor
    from chanscale.files import require_new, write_atomically
    from chanscale.novelty.storage import NOVELTY, find_novelty
    from chanscale.predictions import predict_images

    if table is not None:
        require_new(table, ".csv")
    model, info = load_predictor(run_folder)
    detector = find_novelty(run_folder)
    if abstain and detector is None:
        raise ConfigError(
            f"{run_folder} has no {NOVELTY}, which --abstain needs: an average of models has none, nor an older run, "
            "nor one of volumes, nor one that was restored from a delta; copy the file from the run that has it"
        )
    with watching() as watcher:
        predictions = predict_images(
            model, info, images, skip_bad=skip_bad, frames=frames, detector=detector, abstain=abstain,
            decoding=steps_of(watcher, "decoding images"), predicting=steps_of(watcher, "predicting"),
        )  # fmt: skip
    _report_skipped(predictions.skipped)
    if table is not None:
        write_atomically(table, predictions.to_csv())
        complain(f"wrote {table}")
    rows = predictions.to_dicts()
    if as_json:
        show_json(rows)
    elif table is None:
        out.print(describe_predictions(rows))


@app.command()
def inspect(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="vgg16, efficientnet_lite0, or LIBRARY:NETWORK of one installed, e.g. monai:DenseNet121.",
        ),
    ],
    size: Annotated[int, typer.Option(min=8, help="Side of the example, in pixels or voxels.")] = 64,
    dimensions: Annotated[
        int, typer.Option(min=1, max=3, help="1, 2 or 3, where the network leaves it open.")
    ] = 2,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the example.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Say which channels of a network hang together.

    And which can be removed exactly: each group is tried, with random weights: half of its channels are set to 0, and
    removed.
    """
    from dataclasses import asdict

    import torch

    from chanscale.catalogue import build_network, takes_volumes
    from chanscale.inspection import inspect_network

    if takes_volumes(network):
        dimensions, channels = 3, 1
    model = build_network(network, dimensions=dimensions, channels=channels)
    report = inspect_network(model, torch.randn(2, channels, *[size] * dimensions))
    if as_json:
        show_json({**asdict(report), "prunable": report.prunable})
        return
    out.print(describe_groups(report))
    say(
        f"{percent(report.prunable)} of the convolutions' parameters lie in groups that can be removed exactly."
    )


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    count: Annotated[int, typer.Option(help="Number of images.")] = 600,
    size: Annotated[int, typer.Option(help="Side of each image, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Fixes every image.")] = 0,
) -> None:
    """Draw procedural chest radiographs to try things on.

    One half shows opacities, whose boxes stand in boxes.csv. No substitute for patients.
    """
    _draw_phantoms(folder, count=count, size=size, seed=seed)
    typer.echo(printable(str(folder)))


@app.command("demo")
def run_demo(
    out_folder: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run folder to make.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer, smaller images: to see that it works.")
    ] = False,
    resume: ResumeOption = False,
) -> None:
    """Go the whole way on phantoms, from drawing to figures."""
    from chanscale.runs import RunFolder

    chosen = demo.QUICK if quick else demo.FULL
    folder = chosen.folder_beside(out_folder)
    RunFolder.open(out_folder, chosen.config, resume=resume)  # says no before there is anything to wait for
    if not folder.exists():
        _draw_phantoms(folder, count=chosen.images, size=chosen.image_size, seed=chosen.config.seed)
    _show_run(_fit(folder, out_folder, chosen.config, resume=resume), as_json=False)
    say("The same on your images, in a folder that holds a folder for each class:")
    say(f"    {program()} fit YOUR_IMAGES --out runs/mine --budget {chosen.config.budget}")


def _fit(data: Path, out_folder: Path, config: FitConfig, *, resume: bool) -> "Run":
    from chanscale.pipeline import scale_and_select
    from chanscale.run_images import open_path
    from chanscale.runs import RunFolder

    folder = RunFolder.open(out_folder, config, resume=resume)
    if is_follower():  # the first process says what there is to say
        return scale_and_select(config.backbone, data, config=config, out=out_folder, resume=resume)
    try:
        if config.group_pattern is None:  # else there is nothing to warn of, and no need to list them twice
            warn_about_patients(
                # Without a name, so that they are not held through the run, which opens them itself.
                open_path(data, config),
                None,
                "who may then stand on two sides of the split",
            )
        with watching(config) as watcher:
            return scale_and_select(
                config.backbone, data, config=config, out=out_folder, resume=resume, watcher=watcher
            )
    except (KeyboardInterrupt, OSError, MemoryError, RuntimeError) as stop:
        if folder.partial.exists() and (reason := _name_stop(stop)):
            raise UnfinishedRun(reason) from stop
        raise


def _name_stop(stop: BaseException) -> str | None:
    """Return what stopped a run that can go on; None where it was a defect."""
    from chanscale.files import describe_refusal

    if isinstance(stop, OSError):
        return f"error: {describe_refusal(stop)}"
    if isinstance(stop, KeyboardInterrupt):
        return "interrupted"
    return "error: out of memory; --recompute 1 takes less" if lacks_memory(stop) else None


def require_outside(data: Path, out_folder: Path) -> None:
    """Raise ConfigError when a folder is to be made among the images, where it would be a class."""
    if data.is_dir() and out_folder.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            f"--out {out_folder} lies in the images' folder {data}, where a folder is a class; choose one beside it"
        )


def _take_unseen(images: "ImageSet", run_folder: Path) -> "ImageSet":
    """Return the test images, where the source says which they are; warn of those that the run has seen."""
    from chanscale.artifact import model_path
    from chanscale.data import read_training_names
    from chanscale.data.dicom import name_file
    from chanscale.data.splits import read_training_groups

    test = images.on_side("test")
    if test is not None and len(test) < len(images):
        complain(f"evaluating the {len(test)} of {len(images)} images that {images.source} has as test")
        images = test
    splits = model_path(run_folder).with_name("splits.csv")
    if not splits.exists():
        return images
    seen, patients = read_training_names(splits), read_training_groups(splits)
    count = sum(name_file(record.name) in seen for record in images.records)
    if count:
        complain(
            f"warning: {splits} names {count} of these {len(images)} images as train or validation; "
            "on images that it has seen, a model looks better than it is"
        )
    others = [record for record in images.records if name_file(record.name) not in seen]
    if count := sum(record.has_patient and record.group in patients for record in others):
        complain(
            f"warning: {count} of these {len(images)} images are of patients of whom {splits} names others as train or "
            "validation; on patients that it has seen, a model looks better than it is"
        )
    return images


def warn_about_patients(images: "ImageSet", group_pattern: str | None, danger: str) -> None:
    """Say so when file names look as if several images were of one patient, and no pattern finds it."""
    from chanscale.data import suggest_group_pattern

    pattern = suggest_group_pattern(images) if group_pattern is None else None
    if pattern is not None:
        option = f"--group-pattern {shlex.quote(pattern)}"
        complain(f"warning: file names look as if patients had several images, {danger}; if so, add {option}")


def _draw_phantoms(folder: Path, *, count: int, size: int, seed: int) -> None:
    from chanscale.data.phantoms import write_phantoms

    with watching() as watcher:
        progress = steps_of(watcher, "drawing phantoms")
        write_phantoms(folder, count=count, image_size=size, seed=seed, progress=progress)


def _show_run(run: "Run", *, as_json: bool) -> None:
    from chanscale.report import describe_run
    from chanscale.team import is_main

    if not is_main():
        return
    skipped = run.metrics["images"]["skipped"]
    if skipped:
        complain(f"warning: left out {_count_unreadable(skipped)}; {run.folder}/splits.csv lists the others")
    if doubt := run.metrics.get("operating_point", {}).get("doubt"):
        complain(f"warning: {doubt}")
    if as_json:
        show_json({"run": str(run.folder), **run.metrics})
        return
    out.print(describe_run(run.metrics))
    say(f"Run folder: {run.folder}")
    say(f"Use it: {program()} predict {shlex.quote(str(run.folder))} IMAGE")
    say(run.metrics["notice"])


def _report_skipped(names: tuple[str, ...], *, shown: int = 10) -> None:
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        complain(f"warning: left out {_count_unreadable(len(names))}: {', '.join(names[:shown])}{more}")


def _count_unreadable(number: int) -> str:
    return f"{number} unreadable image{'' if number == 1 else 's'}"
