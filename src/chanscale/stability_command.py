"""The command that compares runs that differ in their seed; `cli` adds it to the others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chanscale.cli_options import JsonOption
from chanscale.display import describe_rows, out, say, show_json, watching
from chanscale.wording import percent

if TYPE_CHECKING:
    from chanscale.explain.seeds import Stability
    from chanscale.explain.stability import Agreement


def stability(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Two run folders or more, that differ in their seed."),
    ],
    images: Annotated[
        Path, typer.Option("--images", metavar="DATA", help="The images that the runs were made of.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say how far channels, maps and answers depend on the seed.

    Writes stability.json into each run folder, from where `report` tells it.
    """
    from chanscale.explain.seeds import measure_stability, write_stability
    from chanscale.explain.stability import STABILITY

    with watching() as watcher:
        found = measure_stability(runs, images, progress=watcher.on_step)
    write_stability(runs, found)
    if as_json:
        show_json(found.to_dict())
        return
    rows = [("channels kept (Jaccard)", *_row(found.channels))]
    rows += [(f"  {name}", *_row(one)) for name, one in found.layers.items()]
    rows += [("maps of an image (rank correlation)", *_row(found.maps))]
    out.print(describe_rows(("agreement of runs", "mean", "least", "most", "by chance"), rows))
    _tell(found)
    say(f"{STABILITY} is in each run folder; `report` tells it.")


def _row(found: "Agreement") -> tuple[str, ...]:
    return tuple(f"{value:.3f}" for value in (found.mean, found.least, found.most, found.chance))


def _tell(found: "Stability") -> None:
    say(
        f"All {len(found.runs)} runs give {percent(found.answers)} of {found.images} images the same class; the "
        f"probability of an image varies by {found.spread:.3f} (standard deviation)."
    )
    if found.seen:
        say(f"{found.seen} of these images were trained on, or validated with, in another of the runs.")
