"""The command that says why a run answers as it does; `cli` adds it to the others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chanscale.cli_options import FramesOption, JsonOption, RunArgument
from chanscale.display import RULES, describe_rows, describe_rules, out, say, show_json, watching

if TYPE_CHECKING:
    from chanscale.explain.answers import Answer
    from chanscale.explain.explanation import Explained


def explain(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of images.")],
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DATA",
            help="The images of the run: maps then show what differs from its training images, and patches of "
            "those are cut.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many channels to name for each image.")] = 5,
    method: Annotated[
        Literal["class-map", "grad-cam", "integrated-gradients"],
        typer.Option(help="The map to show; the last two need captum."),
    ] = "class-map",
    frames: FramesOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Say which channels and places made each answer.

    The parts add up to the logit. They tell what moved the model, which need not be a finding.
    """
    from chanscale.explain.explanation import explain_run

    with watching() as watcher:
        explained = explain_run(
            run, images, out=out_folder, data=data, top=top, method=method, frames=frames,
            progress=watcher.on_step,
        )  # fmt: skip
    if as_json:
        show_json({"folder": str(explained.folder), **explained.index})
    else:
        _show(explained)


def _show(explained: "Explained") -> None:
    named = [title for name, title in RULES.items() if name in explained.answers[0].rules]
    columns = ("image", "predicted", "probability", *named, "logit", "largest contributions")
    out.print(describe_rows(columns, [_row(answer) for answer in explained.answers]))
    say(f"{explained.folder}: a picture and its figures for each image, and index.json")
    say(explained.index["notice"])


def _row(answer: "Answer") -> tuple[str, ...]:
    from chanscale.explain.evidence import signed
    from chanscale.explain.places import shown_name

    largest = ", ".join(
        f"{part.circuit.channel.text} {signed(part.contribution)}" for part in answer.channels[:2]
    )
    told = (answer.predicted, _describe_shares(answer), *describe_rules(answer.rules), signed(answer.logit))
    return shown_name(answer.name), *told, largest


def _describe_shares(answer: "Answer") -> str:
    """Return how probable what is predicted is: of several labels each, and of none the nearest."""
    from chanscale.explain.overlays import percent_of

    nearest, highest = max(answer.shares.items(), key=lambda item: item[1])
    if not answer.multilabel:
        return percent_of(highest)
    held = [f"{name} {percent_of(share)}" for name, share in answer.shares.items() if share > 0.5]
    return ", ".join(held) or f"at most {percent_of(highest)} ({nearest})"
