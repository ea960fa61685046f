"""What the command line shows: progress on stderr, results on stdout."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from chanscale.config import FitConfig
from chanscale.files import to_json
from chanscale.progress import Watcher
from chanscale.schedule import Moment, plan_epochs
from chanscale.wording import counted, percent, printable, shorten, without_controls

if TYPE_CHECKING:
    from chanscale.inspection import NetworkReport

AT_POINT = ("sensitivity", "specificity", "ppv", "npv")
"""The figures of an operating point."""
RULES = {"called_positive": "positive", "prediction_set": "not ruled out"}
"""What the rules of a model say of an image, and how a table calls it."""

WIDEST = 10_000
"""Columns of a line where nothing limits them: a file, or another program, takes rows as they are."""

out = Console(highlight=False)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = WIDEST
err = Console(stderr=True, highlight=False)


class RichWatcher(Watcher):
    """Draws a bar for each piece of work, and one over all epochs; use it as a context.

    `config`: that of the run, which says how many epochs there will be; needed only for a fit.
    """

    def __init__(self, config: FitConfig | None = None, *, console: Console = err) -> None:
        self.config = config or FitConfig()
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(10), TextColumn("{task.fields[status]}"),
            _TimesColumn(), console=console, speed_estimate_period=120,
        )  # fmt: skip
        self._step: tuple[str, TaskID] | None = None
        self._done = 0
        self._epochs: TaskID | None = None
        self._losses: list[float] = []
        self._latest = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on_step(self, what: str, done: int, total: int) -> None:
        """Draw the bar of this piece of work; a piece that starts anew gets another bar."""
        if self._step is None or self._step[0] != what or done < self._done:
            self._drop_unfinished()
            self._step = what, self._bars.add_task(_cut(what), status="")
        self._done = done
        status = f"{shorten(done)}/{shorten(total)}"
        self._bars.update(self._step[1], completed=done, total=total, status=status)

    def on_finding(self, finding: str) -> None:
        """Write it above the bars."""
        self._bars.console.print(finding, markup=False, soft_wrap=True)

    def on_batch(self, moment: Moment, done: int, total: int, loss: float) -> None:
        """Move the bar over all epochs, and show the mean loss of this one."""
        self._losses = [loss] if done == 1 else [*self._losses, loss]
        epochs = count_epochs(self.config, moment)
        if self._epochs is None:
            self._epochs = self._bars.add_task("", status="", completed=moment.epoch * total)
        mean = sum(self._losses) / len(self._losses)
        self._bars.update(
            self._epochs, completed=moment.epoch * total + done, total=epochs * total,
            description=f"{moment.phase} {moment.epoch + 1}/{epochs}",
            status=f"loss {mean:.3f}{self._latest}",
        )  # fmt: skip

    def on_epoch(self, moment: Moment, row: dict[str, Any]) -> None:  # noqa: ARG002
        """Note what the epoch came to, for the bar."""
        self._latest = f" AUC {row['validation_auc']:.3f} {shorten(row['parameters'])} params"

    def _drop_unfinished(self) -> None:
        """Take away the bar of work that was given up, such as a source that did not answer."""
        if self._step is not None and not self._bars.tasks[self._bars.task_ids.index(self._step[1])].finished:
            self._bars.remove_task(self._step[1])


class _TimesColumn(ProgressColumn):
    """How long it has taken, and how long it may still take."""

    def render(self, task: Task) -> Text:
        """Return both, in minutes and seconds."""
        elapsed = _clock(task.finished_time if task.finished else task.elapsed)
        text = elapsed if task.finished else f"{elapsed}, {_clock(task.time_remaining)} to go"
        return Text(text, no_wrap=True)


def _clock(seconds: float | None) -> str:
    return "-:--" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _cut(text: str, length: int = 20) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


class LineWatcher(Watcher):
    """Writes a line for each piece of work and each epoch, for a log or a pipe."""

    def __init__(self, config: FitConfig | None = None, *, console: Console = err) -> None:
        self.config = config or FitConfig()
        self._console = console
        self._step: tuple[str, int] | None = None

    def on_step(self, what: str, done: int, total: int) -> None:
        """Name the piece of work when it begins."""
        if self._step is None or self._step[0] != what or done < self._step[1]:
            self._say(f"{what} ({shorten(total)})")
        self._step = what, done

    def on_finding(self, finding: str) -> None:
        """Write it."""
        self._say(finding)

    def on_epoch(self, moment: Moment, row: dict[str, Any]) -> None:
        """Say what the epoch came to."""
        self._say(
            f"epoch {moment.epoch + 1}/{count_epochs(self.config, moment)} ({moment.phase}): "
            f"loss {row['train_loss']:.3f}, validation AUC {row['validation_auc']:.3f}, "
            f"{row['parameters']:,} parameters left ({percent(row['parameters_removed'])} removed), "
            f"{row['seconds']:.1f} s"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


@contextmanager
def watching(config: FitConfig | None = None) -> Iterator[Watcher]:
    """Give a watcher: bars on a terminal, lines elsewhere."""
    if not err.is_terminal:
        yield LineWatcher(config)
        return
    with RichWatcher(config) as watcher:
        yield watcher


def steps_of(watcher: Watcher, what: str) -> Callable[[int, int], None]:
    """Return the `progress` of one piece of work, which takes (done, total)."""
    return partial(watcher.on_step, what)


def count_epochs(config: FitConfig, moment: Moment) -> int:
    """Return how many epochs there are to the end of this stage; with a tolerance, more may follow."""
    last = next(later for later in plan_epochs(config) if later.stage == moment.stage and later.ends_stage)
    return last.epoch + 1


def program() -> str:
    """Return how `chanscale` is called from here, where its environment may not be active."""
    if shutil.which("chanscale"):
        return "chanscale"
    beside = Path(sys.executable).with_name("chanscale")
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m chanscale"


def say(text: str) -> None:
    """Write one line on stdout, as it is."""
    out.print(printable(text), markup=False, soft_wrap=True)


def complain(message: object) -> None:
    """Write one line on stderr."""
    line = " ".join(line.strip() for line in str(message).splitlines())
    typer.echo(without_controls(printable(line)), err=True)


def show_json(value: Any) -> None:
    """Write one JSON value on stdout; a figure that is not defined becomes null."""
    typer.echo(to_json(value))


def describe_evaluation(judged: Mapping[str, Any]) -> Table:
    """Return a table of what `Evaluation.to_dict` and `judge_rules` give, and of whom: `patients`, `threshold`."""
    patients = f" of {counted(judged['patients'], 'patient')}" if judged["patients"] else ""
    caption = f"{counted(judged['n'], 'image')}{patients}"
    table = Table("", "value", "95 % interval", box=box.SIMPLE_HEAD, caption=caption)
    for name, (low, high) in judged["intervals"].items():
        at = f" at {judged['threshold']:g}" if name in AT_POINT else ""
        table.add_row(Text(f"{name}{at}"), f"{judged[name]:.3f}", f"{low:.3f} to {high:.3f}")
    for name, figure in _name_rules(judged).items():
        table.add_row(Text(name), f"{figure['value']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}")
    for name, told in judged.get("labels", {}).items():
        auc, what = told["auc"], f"auc of {printable(name)} ({told['positives']} of {told['known']})"
        table.add_row(Text(what), f"{auc['value']:.3f}", f"{auc['low']:.3f} to {auc['high']:.3f}")
    return table


def _name_rules(judged: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the figures of the operating point and of prediction sets, by what to call them."""
    point, sets = judged.get("operating_point"), judged.get("prediction_sets")
    figures = {f"{name} at {point['threshold']:.3f}": point[name] for name in AT_POINT} if point else {}
    if sets:
        figures |= {
            f"coverage of sets for {sets['wanted']:g}": sets["coverage"],
            "classes in a set": sets["size"],
        }
    return figures


def describe_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, paths: int = 0) -> Table:
    """Return a table of these rows; numbers stand to the right of their column.

    The first `paths` columns hold files; where the table would be too wide for the terminal, as much of their ends as
    tells them apart.
    """
    table = _to_table(columns, rows)
    if not paths or Measurement.get(out, out.options.update(width=WIDEST), table).maximum <= out.width:
        return table
    ends = _tell_apart({path for row in rows for path in row[:paths]})
    return _to_table(columns, [[*(ends[path] for path in row[:paths]), *row[paths:]] for row in rows])


def _tell_apart(paths: Set[str]) -> dict[str, str]:
    """Return the end of each path, of as many parts as it takes for no two to be alike."""
    for count in range(1, max((path.count("/") for path in paths), default=0) + 1):
        ends = {path: "/".join(path.split("/")[-count:]) for path in paths}
        if len({*ends.values()}) == len(paths):
            return {path: end if end == path else f"…/{end}" for path, end in ends.items()}
    return {path: path for path in paths}


def _to_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        justify: JustifyMethod = "left" if index < 2 else "right"
        table.add_column(Text(name), overflow="fold", justify=justify)
    for row in rows:
        # Not markup: a name may hold brackets, or characters that move the cursor.
        table.add_row(*(Text(without_controls(printable(cell))) for cell in row))
    return table


def describe_groups(report: "NetworkReport") -> Table:
    """Return a table of what `inspect_network` gives: a row for each group."""
    rows = [
        (
            group.name, group.protected or "removable", str(len(group.layers)), str(group.width),
            shorten(group.parameters), shorten(group.macs),
        )
        for group in report.groups
    ]  # fmt: skip
    return describe_rows(("group", "state", "layers", "width", "parameters", "MACs"), rows)


def describe_predictions(predictions: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of what `Predictions.to_dicts` gives."""
    if not predictions:
        return describe_rows(["image"], [])
    first = predictions[0]
    named = [title for name, title in RULES.items() if name in first]
    judged = ["unlike the training images"] if "flagged" in first else []
    rows = [
        [
            item["image"], item["predicted"], *(f"{share:.3f}" for share in item["probabilities"].values()),
            *describe_rules(item),
            *(_describe_novelty(item) for _ in judged),
        ]
        for item in predictions
    ]  # fmt: skip
    columns = ["image", "predicted", *first["probabilities"], *named, *judged]
    return describe_rows(columns, rows, paths=1)


def _describe_novelty(item: Mapping[str, Any]) -> str:
    said = list(item["reasons"]) if item["flagged"] else []
    return "; ".join([*said, *(["near tie"] if item["near_tie"] else [])])


def describe_rules(item: Mapping[str, Any]) -> list[str]:
    """Return what the rules of a model say of one image, those that it has, in the order of `RULES`."""
    said = [item[name] for name in RULES if name in item]
    return [("yes" if one else "no") if isinstance(one, bool) else ", ".join(one) for one in said]
