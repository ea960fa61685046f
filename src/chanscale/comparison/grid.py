"""The folder of a comparison: which cells there are to be, which are there, and that all are of one kind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from chanscale.comparison.cells import (
    UNCOUNTED,
    Cell,
    CellSpec,
    Result,
    cell_path,
    digest_images,
    read_cell,
    split_spec,
)
from chanscale.comparison.methods import configure, find_tries
from chanscale.config import FitConfig, FixedPrecision
from chanscale.data.sources import ImageSet
from chanscale.devices import find_precision
from chanscale.errors import ArtifactError
from chanscale.files import to_json, write_atomically
from chanscale.wording import counted
from chanscale.working_folder import note_failure, read_plan, require_same_plan, working_in

FORMAT = "chanscale-grid/1"


@dataclass(frozen=True)
class Plan:
    """What a grid is to hold: every method on every size, fold and seed, at each learning rate that it tries.

    `sizes`: numbers of training images, None for all. `chosen`: which of the folds are run. `config.seed` fixes the
    folds; `seeds` are those of the cells. `tries`: learning rates of a method, from 1 to 3.
    """

    methods: tuple[str, ...]
    sizes: tuple[int | None, ...]
    folds: int
    chosen: tuple[int, ...]
    seeds: tuple[int, ...]
    config: FitConfig
    tries: int = 1

    def __post_init__(self) -> None:
        self.config.require_one_process("a comparison")

    @property
    def cells(self) -> list[Cell]:
        """Every cell; all methods of one training set in a row, so that half a grid compares them."""
        rates = {method: find_tries(method, self.config, self.tries) for method in self.methods}
        places = product(self.seeds, self.chosen, self.sizes, self.methods)
        return [
            Cell(method, size, fold, seed, lr) for seed, fold, size, method in places for lr in rates[method]
        ]

    def describe(self) -> str:
        """Return how many cells there are, and of what."""
        counts = {"method": self.methods, "size": self.sizes, "fold": self.chosen, "seed": self.seeds}
        product_of = " x ".join(counted(len(values), noun) for noun, values in counts.items())
        tries = f", up to {self.tries} tries of each" if self.tries > 1 else ""
        return f"{counted(len(self.cells), 'cell')}: {product_of}{tries}"

    def specs(
        self,
        data: Path,
        images: ImageSet,
        precision: FixedPrecision,
        *,
        younger: frozenset[str] = frozenset(),
    ) -> list[CellSpec]:
        """Return what each cell needs to run, on images that can be split so. Raises SplitError, ConfigError.

        `younger`: options that there were not when the grid was begun.
        """
        listed = digest_images(images)
        config = self.config.model_copy(update={"precision": precision})
        specs = [
            CellSpec(
                cell, data.absolute(), listed, self.folds, config.seed,
                configure(cell.method, config, seed=cell.seed, lr=cell.lr), younger,
            )
            for cell in self.cells
        ]  # fmt: skip
        for spec in {replace(spec.cell, method="", lr=None): spec for spec in specs}.values():
            split_spec(images, spec)  # says now what would otherwise end every cell
        return specs


class GridFolder:
    """A comparison on disk: `grid.json`, a file for each cell in `cells/`, and what is drawn from them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.cells = out / "cells"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made. Raises ArtifactError."""
        with working_in(
            self.out, plan=self._file, parts=self.cells, written=[self.out, self.cells], what="a grid"
        ):
            yield

    def begin(self, plan: Plan, images: ImageSet) -> FixedPrecision:
        """Note the plan, or add its cells to those noted; return the precision that all cells have.

        It is measured once, so that no cell has another than the rest. Raises ConfigError when the grid was begun
        with other options or images.
        """
        noted = self.read() if self._file.exists() else {}
        fixed = {
            "config": plan.config.model_dump(mode="json"),
            "folds": plan.folds,
            "images": digest_images(images),
        }
        if noted:
            require_same_plan(self.out, noted, fixed, idle=UNCOUNTED)
        precision = noted.get("precision") or find_precision(plan.config)
        names = [cell.name for cell in plan.cells]
        facts = {
            "format": FORMAT, **fixed, "config": noted.get("config", fixed["config"]), "precision": precision,
            "methods": list(dict.fromkeys([*noted.get("methods", ()), *plan.methods])),
            "cells": list(dict.fromkeys([*noted.get("cells", ()), *names])),
        }  # fmt: skip
        write_atomically(self._file, to_json(facts) + "\n")
        return cast(FixedPrecision, precision)

    def read(self) -> dict[str, Any]:
        """Return what `begin` noted. Raises ArtifactError."""
        if not self._file.exists():
            raise ArtifactError(f"there is no grid at {self.out}; begin one with DATA")
        return read_plan(self._file, wanted=FORMAT)

    def find_younger(self) -> frozenset[str]:
        """Return the options that there were not when the grid was begun."""
        return frozenset(FitConfig.model_fields.keys() - self.read()["config"].keys())

    def missing(self, specs: Sequence[CellSpec]) -> list[CellSpec]:
        """Return those whose cell is not there, or damaged, or of other options."""
        found = {spec: read_cell(cell_path(self.cells, spec.cell)) for spec in specs}
        return [spec for spec, result in found.items() if not result or result["digest"] != spec.digest]

    def lend_channels(self, specs: Sequence[CellSpec]) -> Iterator[CellSpec]:
        """Yield `specs`; those that begin with a fit of ours come last, and have its channels where its cell is there.

        A cell is looked for when its turn comes, so that it may have been run meanwhile.
        """
        for spec in sorted(specs, key=lambda spec: spec.find_ours() is not None):
            yield replace(spec, ours=self._read_ours(spec))

    def _read_ours(self, spec: CellSpec) -> Result | None:
        ours = spec.find_ours()
        result = read_cell(cell_path(self.cells, ours.cell)) if ours else None
        if ours is None or result is None or result["digest"] != ours.digest or not result.get("channels"):
            return None
        return {
            name: result[name] for name in ("channels", "seconds", "processor_seconds", "peak_memory_bytes")
        }

    def results(self) -> tuple[list[Result], list[Path]]:
        """Return what the cells that are there came to, and the files that are damaged."""
        paths = sorted(self.cells.glob("*.json"))
        read = [(path, read_cell(path)) for path in paths]
        return [result for _, result in read if result], [path for path, result in read if not result]

    def note_failure(self, cell: Cell, error: str) -> Path:
        """Write why a cell failed beside where it would lie, and return the path."""
        return note_failure(cell_path(self.cells, cell, ".error"), error)

    def note_success(self, cell: Cell) -> None:
        """Take away the error of an earlier try."""
        cell_path(self.cells, cell, ".error").unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.out / "grid.json"
