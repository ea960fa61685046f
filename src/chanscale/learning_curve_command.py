"""The command that says what more images would bring; `cli` adds it to the others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chanscale.cli_options import JsonOption
from chanscale.display import complain, describe_rows, out, say, show_json

if TYPE_CHECKING:
    from chanscale.comparison.learning_curve import LearningCurve, Point

PICTURE = "learning_curve.png"
"""What a picture in the folder of its grid may be called to be drawn again."""


def learning_curve(
    grid: Annotated[
        Path, typer.Argument(metavar="GRID", help="Folder of `chanscale compare` with several --sizes.")
    ],
    method: Annotated[str, typer.Option(help="Which of its methods.")] = "chanscale",
    picture: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="Picture to draw, with a 95 % band.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what two and four times the images would bring.

    A power law is fitted to the AUCs that a grid has on fewer. How far it holds beyond them, nothing here can tell.
    """
    from chanscale.comparison.curve_drawing import draw_curve
    from chanscale.comparison.learning_curve import fit_curve
    from chanscale.files import require_new, write_atomically
    from chanscale.plotting import to_png

    if picture is not None:
        require_new(picture, ".png", renewed=grid / PICTURE)
    curve = fit_curve(_read_points(grid, method))
    if picture is not None:
        write_atomically(picture, to_png(draw_curve(curve, method=method)))
        complain(f"wrote {picture}")
    if as_json:
        show_json({"grid": str(grid), "method": method, **curve.to_dict()})
    else:
        _show(curve)


def _read_points(grid: Path, method: str) -> "tuple[Point, ...]":
    from chanscale.comparison.grid import GridFolder
    from chanscale.comparison.learning_curve import find_points
    from chanscale.comparison.table import make_rows
    from chanscale.errors import ArtifactError

    folder = GridFolder(grid)
    noted = folder.read()
    results, damaged = folder.results()
    for path in damaged:
        complain(f"warning: {path} is damaged and left out; run the grid again to mend it")
    if not results:
        raise ArtifactError(f"no cell of {grid} has been run to its end: there is no curve to fit")
    return find_points(make_rows(results, noted["methods"]), method)


def _show(curve: "LearningCurve") -> None:
    sizes = [(f"{point.images:.0f}", str(len(point.aucs)), f"{point.mean:.3f}", "") for point in curve.points]
    told = curve.to_dict()["forecasts"]
    beyond = [
        (f"{one['images']} ({one['times']} times)", "none", _describe(one["auc"]), _describe(one["gain"], "+.3f"))
        for one in told
    ]  # fmt: skip
    out.print(describe_rows(("training images", "cells", "test AUC", "gain"), [*sizes, *beyond]))
    if curve.is_flat:
        say("More images have not raised the AUC: the best law is flat, and promises nothing of more.")
    else:
        say(f"AUC(n) = {curve.law.a:.3f} - {curve.law.b:.3g} n^-{curve.law.c:.2f}")
    if curve.missed is not None:
        say(
            f"A curve through all but the largest size misses that by {curve.missed:+.3f}; farther off, expect worse."
        )
    say(
        "Medians and 95 % of curves through cells drawn again, if the law holds on; a few sizes cannot show that."
    )
    say("A gain is the median of what each curve rises from the largest size, and no difference of two rows.")


def _describe(figure: dict[str, float], form: str = ".3f") -> str:
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"
