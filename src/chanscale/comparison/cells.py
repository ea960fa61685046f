"""One cell of a comparison: what it is, how it is run, and the file it leaves."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Self, TextIO

from chanscale import training
from chanscale.baselines import BASELINES, ON_OUR_CHANNELS, OurChannels
from chanscale.baselines.fine_tuning import middle
from chanscale.classifier import Classifier
from chanscale.comparison.folds import learning_and_test, split_for_cell
from chanscale.comparison.methods import is_ours, learning_rates, ours_like, plain
from chanscale.config import READING, TIMING, FitConfig, before_it_existed
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.sources import ImageSet
from chanscale.data.splits import SIDES, Splits, split_images
from chanscale.errors import DataError
from chanscale.evaluation import predict
from chanscale.files import read_json, to_json, write_atomically
from chanscale.metrics import mean_auc, metrics_for
from chanscale.pipeline import open_classifier, scale_and_select
from chanscale.progress import Watcher
from chanscale.run_figures import describe_resources
from chanscale.run_images import load_images, open_path

FORMAT = "chanscale-cell/1"
IDLE_OPTIONS = READING | TIMING
"""Options that change nothing of a cell: methods are compared as they come from training, before probabilities are
calibrated."""

UNCOUNTED = IDLE_OPTIONS - {"recompute"}
"""Options that do not tell two cells apart. What is computed again does: a cell has its time and its memory beside its
scores."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A place in the grid. `size` None: all training images; `lr` None: the default learning rate of the method.

    Cells that differ in `lr` alone are tries, one of which counts.
    """

    method: str
    size: int | None
    fold: int
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        size = "all" if self.size is None else f"n{self.size}"
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{self.method}-{size}-f{self.fold}-s{self.seed}{rate}"


@dataclass(frozen=True)
class CellSpec:
    """All that a process, here or elsewhere, has to know to run a cell.

    `images`: digest of the list of images. `config`: that of this cell, with its seed and the options of its method.
    `younger`: options that there were not when the grid was begun; they count where they are
    not what they came to then. `ours`: the cell of ours on the same images, without its scores, whose channels this one
    takes; its figures are those that they would be if it had found them itself.
    """

    cell: Cell
    data: Path
    images: str
    folds: int
    fold_seed: int
    config: FitConfig
    younger: frozenset[str] = frozenset()
    ours: Result | None = field(default=None, hash=False)

    @property
    def digest(self) -> str:
        """A digest of all that its figures follow from."""
        facts = self._facts()
        facts.pop("data")  # the same images may lie elsewhere
        idle = UNCOUNTED | {
            name for name in self.younger if getattr(self.config, name) == before_it_existed(name)
        }
        facts["config"] = {k: v for k, v in facts["config"].items() if k not in idle}
        return digest(facts)

    def to_json(self) -> str:
        """Return one line; `from_json` takes it back."""
        return json.dumps(self._facts() | {"younger": sorted(self.younger), "ours": self.ours})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the spec that `to_json` wrote."""
        facts = json.loads(text)
        facts |= {"cell": Cell(**facts["cell"]), "data": Path(facts["data"])}
        facts["younger"] = frozenset(facts["younger"])
        return cls(**(facts | {"config": FitConfig.build(facts["config"])}))

    def run(self) -> Result:
        """Return what came of the cell. Raises ChanscaleError."""
        return run_cell(self)

    def find_ours(self) -> Self | None:
        """Return the spec of ours on the same images, if this cell is of a method that begins with a fit of it."""
        # With a tolerance, ours goes on behind the budget, where the others have nothing to look for.
        if plain(self.cell.method) not in ON_OUR_CHANNELS or self.config.tolerance is not None:
            return None
        return replace(self, cell=replace(self.cell, method=ours_like(self.cell.method), lr=None))

    def write(self, folder: Path, result: Result) -> Path:
        """Write the file of the cell into `folder`, whole or not at all, and return its path."""
        return write_cell(folder, result)

    def _facts(self) -> dict[str, Any]:
        own = {
            "cell": asdict(self.cell),
            "data": str(self.data),
            "config": self.config.model_dump(mode="json"),
        }
        return {"images": self.images, "folds": self.folds, "fold_seed": self.fold_seed, **own}


@dataclass(frozen=True)
class _Trained:
    """A trained classifier; parameters and MACs of its trunk before and after; the machine it took; what ours found."""

    model: Classifier
    trunk: tuple[int, int]
    kept: tuple[int, int]
    machine: dict[str, Any]
    channels: dict[str, Any] | None = None


def run_cell(spec: CellSpec, watcher: Watcher | None = None) -> Result:
    """Train one method on one training set, judge it on its test images, and return what came of it.

    The method is not given the test images. `lr`: the learning rate it had, if it has one. `warnings`: what training
    warned of, if anything. `seconds`: from files to a trained classifier; `processor_seconds`: those that the process
    computed meanwhile, on all its threads together, which other work on the machine changes little. Raises
    ChanscaleError.
    """
    watcher = watcher or Watcher()
    images = open_path(spec.data, spec.config)
    if digest_images(images) != spec.images:
        raise DataError(f"the images of {spec.data} have changed since the grid was begun; use another --out")
    learning, test = learning_and_test(images, split_spec(images, spec))
    config = configure_learning(spec.config)
    began, computed = perf_counter(), process_time()
    train = _train_ours if is_ours(spec.cell.method) else _train_baseline
    with _hearing_warnings() as warnings:
        trained = train(spec, learning, config, watcher)
    spent = {"seconds": perf_counter() - began, "processor_seconds": process_time() - computed}
    machine = trained.machine
    if spec.ours:
        spent = {name: seconds + spec.ours[name] for name, seconds in spent.items()}
        machine = machine | {
            "peak_memory_bytes": max(machine["peak_memory_bytes"], spec.ours["peak_memory_bytes"])
        }
    seen, unseen = load_images(learning, config, watcher), load_images(test, config, watcher)
    return {
        "format": FORMAT, "digest": spec.digest, "cell": asdict(spec.cell), "classes": list(images.classes),
        "lr": _learning_rate(spec),
        **_judge(trained.model, unseen), "validation_auc": _validation_auc(trained.model, seen),
        "parameters": _describe_change(trained.trunk[0], trained.kept[0]),
        "macs": _describe_change(trained.trunk[1], trained.kept[1]),
        "images": {side: len(seen.images.on_side(side) or ()) for side in SIDES[:2]} | {"test": len(unseen)},
        **({"channels": trained.channels} if trained.channels else {}),
        **({"warnings": warnings} if warnings else {}),
        **{name: round(seconds, 2) for name, seconds in spent.items()}, **machine,
    }  # fmt: skip


def configure_learning(config: FitConfig) -> FitConfig:
    """Return the options for images that stand on their sides, none of them test, and probabilities that none reads."""
    # What these say has been done, or is not to be: class order, patients, and a test side.
    unread: dict[str, Any] = {"calibrate": False, "sensitivity": None, "coverage": None}
    # What is compared computes alike, whatever else the machine does meanwhile.
    return config.already_opened().model_copy(update=unread | {"test": 0.0, "speed": "off"})


def split_spec(images: ImageSet, spec: CellSpec) -> Splits:
    """Return the sides of the cell of `spec`. Raises SplitError, ConfigError."""
    cell, config = spec.cell, spec.config
    return split_for_cell(
        images, fold=cell.fold, folds=spec.folds, fold_seed=spec.fold_seed, seed=cell.seed, size=cell.size,
        validation=config.validation, test=config.test,
    )  # fmt: skip


def digest_images(images: ImageSet) -> str:
    """Return a digest of the names of `images`, their classes and their patients, not of their pixels."""
    rows = [(record.name, record.label, record.group, record.split) for record in images.records]
    return digest([images.classes, sorted(rows, key=lambda row: row[0])])


def digest(value: Any) -> str:
    """Return a short digest of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_cell(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the file of a cell into `folder`, whole or not at all, and return its path."""
    path = cell_path(folder, Cell(**result["cell"]))
    write_atomically(path, to_json(result) + "\n")
    return path


def read_cell(path: Path) -> Result | None:
    """Return what `write_cell` wrote, or None where it is missing or damaged."""
    try:
        result = read_json(path)
        whole = result["format"] == FORMAT and Cell(**result["cell"]).name == path.name.removesuffix(".json")
        whole = whole and all(isinstance(result[of], dict) for of in ("parameters", "macs"))
        lengths = {len(column) for column in result["test"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if whole and len(lengths) == 1 else None


def cell_path(folder: Path, cell: Cell, suffix: str = ".json") -> Path:
    """Return where the file of a cell lies."""
    return folder / f"{cell.name}{suffix}"


class _Listener(logging.StreamHandler[TextIO]):
    """Notes what is warned of, and passes it on to stderr, which tells of a cell that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.heard.append(record.getMessage())


@contextmanager
def _hearing_warnings() -> Iterator[list[str]]:
    """Give the list of what training warns of meanwhile; what the images alone are warned of is no cell's."""
    listener, log = _Listener(), logging.getLogger(training.__name__)
    log.addHandler(listener)
    try:
        yield listener.heard
    finally:
        log.removeHandler(listener)


def _learning_rate(spec: CellSpec) -> float | None:
    rates = learning_rates(spec.cell.method, spec.config)
    return spec.cell.lr or (middle(rates) if rates else None)


def _train_ours(_: CellSpec, images: ImageSet, config: FitConfig, watcher: Watcher) -> _Trained:
    run = scale_and_select(config.backbone, images, config=config, watcher=watcher)
    sizes = run.metrics["parameters"], run.metrics["macs"]
    machine = {name: run.metrics[name] for name in ("peak_memory_bytes", "threads", "versions")}
    before, after = (tuple(size[name] for size in sizes) for name in ("trunk", "kept"))
    found = {"depth": run.metrics["depth"], "kept": run.info.kept}
    return _Trained(run.model, (before[0], before[1]), (after[0], after[1]), machine, found)


def _train_baseline(spec: CellSpec, images: ImageSet, config: FitConfig, watcher: Watcher) -> _Trained:
    decoded = load_images(images, config, watcher)
    splits = split_images(decoded.images, validation=config.validation, test=0, seed=config.seed)
    _, classifier = open_classifier(config.backbone, decoded, splits, config, watcher)
    before = _sizes(classifier, decoded)
    own: dict[str, Any] = {} if spec.cell.lr is None else {"lr": spec.cell.lr}
    if spec.ours:
        own["found"] = OurChannels.from_dict(spec.ours["channels"])
    model, _ = BASELINES[plain(spec.cell.method)](classifier, decoded, splits, config, watcher, **own)
    return _Trained(model.eval(), before, _sizes(model, decoded), describe_resources())


def _sizes(model: Classifier, images: DecodedImages) -> tuple[int, int]:
    """Return the parameters of the trunk, and its MACs for one image."""
    example = images.batch([0])[0].to(next(model.parameters()).device)
    cost = trunk_cost(model, (), example)
    return cost.parameters(), cost.macs()


def _describe_change(before: int, after: int) -> dict[str, float]:
    return {"trunk": before, "kept": after, "removed": 1 - after / before}


def _judge(model: Classifier, images: DecodedImages) -> dict[str, Any]:
    scores, labels = predict(model, images, range(len(images)))
    figures = {name: metric(scores, labels) for name, metric in metrics_for(len(model.classes)).items()}
    records = images.images.records
    return figures | {
        "test": {
            "names": [record.name for record in records],
            "groups": [record.group for record in records],
            "labels": labels.tolist(),
            "scores": scores.tolist(),
        }
    }


def _validation_auc(model: Classifier, images: DecodedImages) -> float:
    side = [index for index, record in enumerate(images.images.records) if record.split == "validation"]
    return mean_auc(*predict(model, images, side))
