"""The table of a comparison, from whatever cells there are."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chanscale.comparison.differences import Scores, mean_interval, paired_difference
from chanscale.comparison.methods import find_reference, is_ours, ours_like
from chanscale.errors import ArtifactError, ConfigError
from chanscale.metrics import Estimate
from chanscale.wording import percent, shorten

Result = Mapping[str, Any]
COLUMNS = (
    "method", "images", "cells", "tries", "test AUC", "ours less it", "accuracy", "parameters kept", "removed",
    "MACs", "seconds", "processor s", "peak GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method on one size: means over its cells; `difference` is the AUC of ours less its, None for ours.

    `auc` is a mean over folds, and its interval one over them, as seeds of a fold are tested on the same patients.
    `ours`: that with the common options; for a baseline at a budget of its own, ours at the same, if that is there.
    `results`: those chosen, one of each fold and seed. `tries`: of how many, the least and the most.
    """

    method: str
    size: int | None
    results: tuple[Result, ...]
    tries: tuple[int, int]
    auc: Estimate
    ours: str | None
    difference: Estimate | None

    @property
    def folds(self) -> int:
        """How many folds there are cells of."""
        return len({result["cell"]["fold"] for result in self.results})

    def mean(self, *path: str) -> float:
        """Return the mean of a figure of the cells, such as `("macs", "kept")`; nan are left out."""
        return mean_interval([find(result, *path) for result in self.results]).value

    def to_cells(self) -> tuple[str, ...]:
        """Return the row in words, a text for each of `COLUMNS`."""
        least, most = self.tries
        return (
            self.method, "all" if self.size is None else str(self.size), str(len(self.results)),
            str(most) if least == most else f"{least}-{most}",
            _describe(self.auc), "" if self.difference is None else _describe(self.difference, "+.3f"),
            f"{self.mean('accuracy'):.3f}", shorten(self.mean("parameters", "kept")),
            percent(self.mean("parameters", "removed")), shorten(self.mean("macs", "kept")),
            *(_whole(self.mean(name)) for name in ("seconds", "processor_seconds")),
            f"{self.mean('peak_memory_bytes') / 2**30:.2f}",
        )  # fmt: skip


def find(result: Result, *path: str) -> float:
    """Return a figure of a cell; nan where it was not defined, or not yet recorded."""
    value: Any = result
    for name in path:
        value = value.get(name)
    return math.nan if value is None else float(value)


def choose(tries: Iterable[Result]) -> Result:
    """Return the try with the best validation AUC; of several, that with the lowest learning rate.

    No figure of a test image has a say.
    """
    return min(tries, key=_rank)


def make_rows(results: Iterable[Result], methods: Sequence[str], *, against: str | None = None) -> list[Row]:
    """Return a row for each method, in the order of `methods`, on each size; a difference counts common cells.

    Of the cells that differ in their learning rate alone, the one to `choose` counts. `against`: the method that all
    others are compared with, instead of ours. Raises ConfigError when there is no cell of it.
    """
    found: dict[tuple[int | None, str], dict[tuple[int, int], list[Result]]] = {}
    for (method, size, fold, seed), tries in _gather(results).items():
        found.setdefault((size, method), {})[fold, seed] = tries
    present = {method for _, method in found}
    order = [method for method in dict.fromkeys([*methods, *sorted(present)]) if method in present]
    if against not in {None, *present}:
        raise ConfigError(f"there is no cell of {against}; there are cells of {', '.join(order)}")
    reference = against or find_reference(order)

    def ours_for(method: str, size: int | None) -> str | None:
        twin = ours_like(method)
        return twin if not (against or is_ours(method)) and (size, twin) in found else reference

    return [
        _make_row(method, size, found, ours_for(method, size))
        for size in sort_sizes(size for size, _ in found)
        for method in order
        if (size, method) in found
    ]


def sort_sizes(sizes: Iterable[int | None]) -> list[int | None]:
    """Return the sizes, each once, ascending; all images come last."""
    return sorted(set(sizes), key=lambda size: math.inf if size is None else size)


def to_markdown(rows: Sequence[Row], *, missing: int) -> str:
    """Return the table with what its numbers mean; `missing` cells are still to be run."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.to_cells() for row in rows)]
    reference = next((row.method for row in rows if row.difference is None), None)
    budgeted = ", ".join(dict.fromkeys(row.method for row in rows if row.ours != reference))
    notes = [
        "Means over cells. In brackets, 95 %: behind the AUC a t interval over folds, each a mean of its seeds, whose "
        "training images overlap, which makes it somewhat narrow; it ends at 1. Of one fold there is none.",
        "Tries: cells that differ in the learning rate alone; of these, the one with the best validation AUC counts. "
        "1-3: some have fewer.",
        "Seconds: of the chosen training, from files to a trained classifier; processor s: those computed meanwhile, "
        "on all threads together. Those of random and select-only hold the fit of ours whose channels they begin with.",
    ]
    if reference and len({row.method for row in rows}) > 1:
        notes.insert(
            1,
            f"Ours less it: AUC of {reference} less that of the method, on the cells that both have; paired bootstrap "
            "over the test images, by patient where known. It knows of other patients, not of other trainings."
            + (f" For {budgeted}, ours is that of the same budget." if budgeted else ""),
        )
    if any(row.size for row in rows):
        notes.append("Of n training images: epochs and tries are chosen on n validation images at most.")
    if missing:
        notes.append(f"**{missing} cells are missing.**")
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *notes]) + "\n"


def to_csv(results: Iterable[Result]) -> str:
    """Return a CSV table with a row for each cell, without its scores; `chosen`: whether it counts in the table."""
    chosen = [(choose(tries), tries) for tries in _gather(results).values()]
    rows = [_flatten(result, chosen=result is best) for best, tries in chosen for result in tries]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _gather(results: Iterable[Result]) -> dict[tuple[str, int | None, int, int], list[Result]]:
    """Return the tries of each method on each size, fold and seed."""
    tries: dict[tuple[str, int | None, int, int], list[Result]] = {}
    for result in results:
        cell = result["cell"]
        tries.setdefault((cell["method"], cell["size"], cell["fold"], cell["seed"]), []).append(result)
    return tries


def _rank(result: Result) -> tuple[float, float]:
    auc = find(result, "validation_auc")
    return math.inf if math.isnan(auc) else -auc, result.get("lr") or 0.0


def _make_row(
    method: str,
    size: int | None,
    found: Mapping[tuple[int | None, str], Mapping[tuple[int, int], Sequence[Result]]],
    ours: str | None,
) -> Row:
    """Return the row of a method beside `ours`; `found`: the tries of each size and method, by fold and seed."""
    tries, difference = found[size, method], None
    chosen = {key: choose(several) for key, several in tries.items()}
    if method != ours:
        others = found.get((size, ours or ""), {})
        common = sorted(tries.keys() & others.keys())
        difference = paired_difference([_pair(choose(others[key]), chosen[key]) for key in common])
    counts = [len(several) for several in tries.values()]
    auc = _cut_off(_average_folds(chosen))
    return Row(method, size, tuple(chosen.values()), (min(counts), max(counts)), auc, ours, difference)


def _average_folds(chosen: Mapping[tuple[int, int], Result]) -> Estimate:
    """Return the mean AUC of the folds with its interval, each the mean of its seeds; `chosen`: by fold and seed."""
    folds: dict[int, list[float]] = {}
    for (fold, _), result in chosen.items():
        folds.setdefault(fold, []).append(find(result, "auc"))
    return mean_interval([mean_interval(aucs).value for aucs in folds.values()])


def _cut_off(auc: Estimate) -> Estimate:
    """Return the interval of an AUC without what lies outside of 0 and 1, where a t interval of few folds may reach."""
    return Estimate(auc.value, max(auc.low, 0.0), min(auc.high, 1.0))


def _pair(ours: Result, other: Result) -> tuple[Scores, Scores]:
    pair = Scores.of(ours), Scores.of(other)
    if pair[0].names != pair[1].names or not np.array_equal(pair[0].labels, pair[1].labels):
        names = [f"{result['cell']['method']}" for result in (ours, other)]
        raise ArtifactError(
            f"the cells of {names[0]} and {names[1]}, fold {ours['cell']['fold']}, seed {ours['cell']['seed']}, have "
            "other test images; remove both, and run them again"
        )
    return pair


def _whole(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.0f}"


def _describe(figure: Estimate, form: str = ".3f") -> str:
    if math.isnan(figure.value):
        return ""
    return f"{figure.value:{form}}" + (
        "" if math.isnan(figure.low) else f" [{figure.low:{form}}, {figure.high:{form}}]"
    )


def _flatten(result: Result, *, chosen: bool) -> dict[str, Any]:
    cell: dict[str, Any] = result["cell"]
    parts = {
        f"{name}_{key}": value
        for name in ("parameters", "macs", "images")
        for key, value in result[name].items()
    }
    plain = {name: value for name, value in result.items() if not isinstance(value, Mapping | list)}
    where = cell | {"size": "all" if cell["size"] is None else cell["size"], "chosen": chosen}
    return where | plain | parts | {f"version_{name}": value for name, value in result["versions"].items()}
