"""The commands that write a run in a form to deploy, and measure what that gains; `cli` adds them to the others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chanscale.cli_options import JsonOption, RunArgument
from chanscale.display import complain, describe_rows, out, say, show_json, watching
from chanscale.errors import ConfigError
from chanscale.wording import milliseconds, shorten, size_on_disk

if TYPE_CHECKING:
    from chanscale.export.forms import Exported
    from chanscale.export.race import Entry, Race


def export(
    run: RunArgument,
    form: Annotated[
        Literal["onnx", "torch", "web", "delta"],
        typer.Option(
            "--format",
            help="onnx or torch: raw pixels in, probabilities out; web: a page; delta: what is new.",
        ),
    ] = "onnx",
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="What to write; default: in the run folder.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="The images of the run, to check on; default: phantoms."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Whole numbers for ONNX, calibrated on the training images of --images."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run in a form to deploy, compared with the run.

    A probability that differs by more than 1e-4 is an error, and nothing is written. With --int8 that is asked
    of the graph in fp32 which it is made of; what int8 changes is told.
    """
    from dataclasses import asdict

    from chanscale.export.forms import export_run

    with watching() as watcher:
        exported = export_run(run, form, out=out_path, images=images, int8=int8, progress=watcher.on_step)
    if as_json:
        show_json({**asdict(exported), "path": str(exported.path)})
    else:
        _show_export(exported)


def latency(
    run: RunArgument,
    image_size: Annotated[
        int | None, typer.Option(min=32, help="Side of the images, in pixels; default: that of the run.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Images at a time, by commas.")] = "1,32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="About how long to measure each runtime and batch.")
    ] = 20.0,
    int8: Annotated[bool, typer.Option("--int8", help="Measure the run in int8 too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a run against the network it was made of.

    In PyTorch and in ONNX Runtime, the networks take turns in one process; the memory of each is measured in a process
    of its own.
    """
    from dataclasses import asdict

    from chanscale.export.race import measure_latency

    with watching() as watcher:
        raced = measure_latency(
            run, image_size=image_size, batches=_parse_batches(batches), threads=threads, seconds=seconds,
            int8=int8, progress=watcher.on_step,
        )  # fmt: skip
    if as_json:
        rows = [{**asdict(entry), "gain": raced.gain(entry)} for entry in raced.entries]
        show_json({**asdict(raced), "entries": rows})
    else:
        _show_race(raced)
    for entry in raced.entries:
        if entry.network != "original" and raced.gain(entry) <= 1:
            complain(
                f"warning: {entry.network} is not faster than the original in {entry.runtime} at batch {entry.batch}"
            )


def _parse_batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--batches takes whole numbers above 0, by commas, such as 1,32. Got {text!r} instead."
        )
    return [int(part) for part in parts]


def _show_export(exported: "Exported") -> None:
    say(f"{exported.path}: {size_on_disk(exported.size)}")
    if exported.agreement:
        difference, images = exported.agreement.difference, exported.agreement.images
        whose = "Largest difference of a probability from the run's"
        whose = f"{whose}, of the graph in fp32" if exported.int8 else whose
        say(f"{whose}: {difference:.1e}, over {images} images.")
    if trial := exported.int8:
        say(f"int8: AUC {trial.auc:.3f}, in fp32 {trial.auc_fp32:.3f}, on {trial.images} images;")
        say(f"a probability changes by {trial.largest_change:.1e} at most;")
        faster = trial.latency_fp32.median / trial.latency.median
        say(f"{milliseconds(trial.latency.median)} ms for an image, {faster:.1f} times as fast as fp32.")


def _show_race(raced: "Race") -> None:
    columns = ("runtime", "batch", "network", "ms", "quartiles", "faster", "memory")
    out.print(describe_rows(columns, [_row(raced, entry) for entry in raced.entries]))
    say(
        f"{raced.image_size} px, {raced.threads} threads; median times of a batch, the networks taking turns."
    )
    ratio = raced.macs["original"] / raced.macs["small"]
    macs = ", ".join(f"{name} {shorten(count)}" for name, count in raced.macs.items())
    say(f"MACs for an image: {macs} ({ratio:.1f} times fewer).")
    say(f"ONNX files: {', '.join(f'{name} {size_on_disk(size)}' for name, size in raced.sizes.items())}.")


def _row(raced: "Race", entry: "Entry") -> tuple[str, ...]:
    timing = entry.timing
    return (
        entry.runtime, str(entry.batch), entry.network, milliseconds(timing.median),
        f"{milliseconds(timing.low)} - {milliseconds(timing.high)}", f"{raced.gain(entry):.1f} x",
        size_on_disk(entry.memory),
    )  # fmt: skip
