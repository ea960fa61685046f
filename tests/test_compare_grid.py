"""What a grid holds, what it refuses, and what is drawn from the cells that are there."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chanscale.comparison.cells import FORMAT, Cell, CellSpec, digest_images, read_cell, write_cell
from chanscale.comparison.differences import Scores, paired_difference
from chanscale.comparison.drawing import compare_with, draw_grid
from chanscale.comparison.grid import GridFolder, Plan
from chanscale.comparison.plots import draw_accuracy_size, draw_small_data
from chanscale.comparison.processes import run_cells
from chanscale.comparison.table import choose, make_rows, to_csv, to_markdown
from chanscale.config import FitConfig
from chanscale.errors import ArtifactError, ConfigError, SplitError
from test_compare_folds import make_images

CONFIG = FitConfig(precision="32-true", group_pattern="^(\\d+)_")
PLAN = Plan(("head", "chanscale"), (25, None), 3, (0, 1, 2), (0, 1), CONFIG)


def make_result(cell: Cell, *, signal=1.0, digest="d", validation=0.9) -> dict:
    """What a cell might come to; the same images and noise in every method."""
    rng = np.random.default_rng((cell.fold, cell.seed))
    labels = np.arange(30) % 2
    score = 1 / (1 + np.exp(-(signal * (2 * labels - 1) + rng.normal(size=30))))
    names = [f"{cell.fold}_{index}.png" for index in range(30)]
    size = {"trunk": 1000, "kept": 50, "removed": 0.95}
    return {
        "format": FORMAT, "digest": digest, "cell": vars(cell), "classes": ["no", "yes"], "auc": 0.8 + 0.01 * cell.fold,
        "lr": cell.lr or 1e-2, "accuracy": 0.75, "validation_auc": validation, "parameters": size, "macs": size,
        "seconds": 3.0,
        "images": {"train": cell.size or 120, "validation": 20, "test": 30}, "peak_memory_bytes": 2**30, "threads": 1,
        "versions": {"torch": "2"},
        "test": {
            "names": names, "groups": names, "labels": labels.tolist(),
            "scores": np.stack([1 - score, score], 1).tolist(),
        },
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> GridFolder:
    """A grid that is begun, without a cell."""
    folder = GridFolder(tmp_path / "grid")
    with folder.working():
        folder.begin(PLAN, make_images())
    return folder


# --- what a grid holds


def test_a_grid_is_every_method_on_every_training_set():
    names = [cell.name for cell in PLAN.cells]
    assert len(set(names)) == len(names) == 2 * 2 * 3 * 2
    assert names[:4] == ["head-n25-f0-s0", "chanscale-n25-f0-s0", "head-all-f0-s0", "chanscale-all-f0-s0"]
    assert {cell.fold for cell in replace(PLAN, chosen=(2,)).cells} == {2}


def test_each_try_is_a_cell_of_its_own_and_more_tries_are_more_cells():
    plan = Plan(("head", "full", "chanscale", "select-only"), (None,), 3, (0,), (0,), CONFIG)
    names = [cell.name for cell in replace(plan, tries=3).cells]
    assert names == [
        "head-all-f0-s0",
        "full-all-f0-s0", "full-all-f0-s0-lr1e-05", "full-all-f0-s0-lr0.0001",
        "chanscale-all-f0-s0", "chanscale-all-f0-s0-lr0.003", "chanscale-all-f0-s0-lr0.03",
        "select-only-all-f0-s0",
    ]  # fmt: skip
    fewer = {tries: [cell.name for cell in replace(plan, tries=tries).cells] for tries in (1, 2)}
    assert fewer[2] == [name for name in names if not name.endswith(("lr0.0001", "lr0.03"))]
    assert fewer[1] == [name for name in names if "lr" not in name]


def test_the_learning_rate_of_a_try_is_that_of_its_config_and_in_its_digest():
    plan = replace(PLAN, methods=("full", "chanscale+refine_lr=0.05"), sizes=(None,), tries=3)
    specs = plan.specs(Path("data"), make_images(), "32-true")[:6]
    assert [spec.cell.lr for spec in specs] == [None, 1e-5, 1e-4, None, 0.015, 0.15]
    assert [spec.config.refine_lr for spec in specs] == [0.01] * 3 + [0.05, 0.015, 0.15]
    assert len({spec.digest for spec in specs}) == 6
    assert all(read_again(spec) == spec for spec in specs)


def read_again(spec):
    return CellSpec.from_json(spec.to_json())


def test_a_spec_goes_through_a_pipe():
    images = make_images()
    for spec in PLAN.specs(Path("data"), images, "32-true"):
        again = read_again(spec)
        assert again == spec
        assert again.digest == spec.digest


def test_the_digest_is_that_of_all_that_figures_follow_from():
    spec, other, *_ = PLAN.specs(Path("data"), make_images(), "32-true")
    assert spec.digest != other.digest
    assert spec.digest != replace(spec, images="other").digest
    assert (
        spec.digest != replace(spec, config=spec.config.model_copy(update={"precision": "bf16-mixed"})).digest
    )
    same = spec.config.model_copy(update={"workers": 7, "cache_gib": 1.0})
    assert spec.digest == replace(spec, config=same, data=Path("elsewhere")).digest


def test_the_digest_of_images_does_not_follow_their_order():
    images = make_images()
    turned = replace(images, records=images.records[::-1])
    assert digest_images(images) == digest_images(turned)
    assert digest_images(images) != digest_images(replace(images, records=images.records[1:]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sizes": (1000,)}, ConfigError, "use all"),
        ({"folds": 60, "chosen": (0,)}, SplitError, "too few for"),
        ({"tries": 3, "config": FitConfig(refine_lr=5)}, ConfigError, "chanscale: refine_lr: .* equal to 10"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_cell_runs(change, error, words):
    with pytest.raises(error, match=words):
        replace(PLAN, **change).specs(Path("data"), make_images(), "32-true")


# --- the folder


def test_a_cell_that_is_there_is_not_run_again(folder):
    specs = PLAN.specs(Path("data"), make_images(), "32-true")
    assert folder.missing(specs) == specs
    write_cell(folder.cells, make_result(specs[0].cell, digest=specs[0].digest))
    write_cell(folder.cells, make_result(specs[1].cell, digest="of other options"))
    assert folder.missing(specs) == specs[1:]


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda _: "{}", lambda _: "", lambda _: "[1]"])
def test_a_damaged_cell_is_run_again_and_named(folder, damage):
    spec = PLAN.specs(Path("data"), make_images(), "32-true")[0]
    path = write_cell(folder.cells, make_result(spec.cell, digest=spec.digest))
    path.write_text(damage(path.read_text()))
    assert read_cell(path) is None
    assert folder.missing([spec]) == [spec]
    assert folder.results() == ([], [path])


METHODS = ("random", "head", "chanscale")


def lend(folder, *, methods=METHODS, tolerance=None, **ours) -> dict[str, dict | None]:
    """What the cells of a training set are lent, in their order, once that of ours, the last, came to `ours`."""
    plan = replace(PLAN, methods=methods, sizes=(None,), chosen=(0,), seeds=(0,))
    plan = replace(plan, config=plan.config.model_copy(update={"tolerance": tolerance}))
    specs = plan.specs(Path("data"), make_images(), "32-true")
    lent = folder.lend_channels(specs)
    first = [next(lent), next(lent)]  # that of ours is run while the last one waits for its turn
    result = make_result(specs[-1].cell, digest=specs[-1].digest) | {"processor_seconds": 4.0} | ours
    write_cell(folder.cells, result)
    return {spec.cell.method: spec.ours for spec in (*first, *lent)}


def test_the_channels_of_ours_are_lent_to_those_that_would_fit_it_again(folder):
    channels = {"depth": {"layer": None, "without": [], "aucs": {}}, "kept": {"trunk.0": [1, 3]}}
    lent = lend(folder, channels=channels)
    assert list(lent) == ["head", "chanscale", "random"]
    assert lent["head"] is lent["chanscale"] is None
    assert lent["random"] == {
        "channels": channels, "seconds": 3.0, "processor_seconds": 4.0, "peak_memory_bytes": 2**30,
    }  # fmt: skip


def test_channels_are_lent_to_those_of_the_same_budget(folder):
    kept = {"channels": {"kept": {"trunk.0": [1, 3]}}}
    methods = ("random@0.99", "random", "chanscale", "chanscale@0.99")
    lent = lend(folder, methods=methods, **kept)
    assert list(lent) == ["chanscale", "chanscale@0.99", "random@0.99", "random"]
    assert lent["random@0.99"]["channels"] == kept["channels"]
    assert lent["random"] is None  # the cell of ours at the common budget has not been run


@pytest.mark.parametrize(
    "ours",
    [
        {},
        {"channels": {"kept": {}}, "digest": "of other options"},
        {"channels": {"kept": {}}, "tolerance": 0.01},
    ],
)
def test_channels_that_are_not_known_or_of_another_fit_are_not_lent(folder, ours):
    assert lend(folder, **ours)["random"] is None


def test_a_cell_under_another_name_is_not_taken(folder):
    path = write_cell(folder.cells, make_result(PLAN.cells[0]))
    assert read_cell(path.rename(folder.cells / "head-n50-f0-s0.json")) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": 4}, "was begun with folds=3, not 4"),
        ({"config": CONFIG.model_copy(update={"budget": 0.9})}, "was begun with budget=0.95, not 0.9"),
        ({"config": CONFIG.model_copy(update={"seed": 1})}, "was begun with seed=0, not 1"),
    ],
)
def test_other_options_are_refused(folder, change, words):
    before = (folder.out / "grid.json").read_text()
    with pytest.raises(ConfigError, match=words), folder.working():
        folder.begin(replace(PLAN, **change), make_images())
    assert (folder.out / "grid.json").read_text() == before


def test_other_images_are_refused(folder):
    with pytest.raises(ConfigError, match="begun with other images"), folder.working():
        folder.begin(PLAN, make_images(60))


def test_a_grid_may_grow_and_decoding_threads_may_change(folder):
    more = replace(PLAN, methods=("full",), seeds=(5,), config=CONFIG.model_copy(update={"workers": 5}))
    with folder.working():
        assert folder.begin(more, make_images()) == "32-true"
    noted = folder.read()
    assert noted["methods"] == ["head", "chanscale", "full"]
    assert len(noted["cells"]) == 24 + 6


def test_a_grid_goes_on_when_there_are_more_options_than_when_it_was_begun(folder):
    specs = PLAN.specs(Path("data"), make_images(), "32-true", younger=frozenset({"early_removal"}))
    write_cell(folder.cells, make_result(specs[0].cell, digest=specs[0].digest))
    noted = folder.read()
    del noted["config"]["early_removal"]
    (folder.out / "grid.json").write_text(json.dumps(noted))
    with folder.working():
        folder.begin(PLAN, make_images())
    assert folder.find_younger() == {"early_removal"}
    assert folder.missing(specs) == specs[1:]
    later = [replace(spec, config=spec.config.model_copy(update={"early_removal": False})) for spec in specs]
    assert folder.missing(later) == later, "an option that is set changes the figures"
    other = replace(PLAN, config=CONFIG.model_copy(update={"early_removal": False}))
    with pytest.raises(ConfigError, match="was begun with early_removal=True, not False"), folder.working():
        folder.begin(other, make_images())


def test_before_there_was_a_depth_the_whole_trunk_was_used(folder):
    noted = folder.read()
    del noted["config"]["depth"]
    (folder.out / "grid.json").write_text(json.dumps(noted))
    with pytest.raises(ConfigError, match="was begun with depth='full', not 'auto'"), folder.working():
        folder.begin(PLAN, make_images())
    full = replace(PLAN, config=CONFIG.model_copy(update={"depth": "full"}))
    with folder.working():
        folder.begin(full, make_images())


def test_what_is_computed_again_tells_cells_apart_and_an_older_grid_has_none_of_it(folder):
    noted = folder.read()
    del noted["config"]["recompute"]
    (folder.out / "grid.json").write_text(json.dumps(noted))
    with pytest.raises(ConfigError, match=r"was begun with recompute=0\.0, not 0\.5"), folder.working():
        folder.begin(PLAN, make_images())
    none = replace(PLAN, config=CONFIG.model_copy(update={"recompute": 0.0}))
    with folder.working():
        folder.begin(none, make_images())
    kept, again = (
        plan.specs(Path("data"), make_images(), "32-true", younger=folder.find_younger())
        for plan in (none, PLAN)
    )
    assert not {spec.digest for spec in kept} & {spec.digest for spec in again}
    write_cell(folder.cells, make_result(kept[0].cell, digest=kept[0].digest))
    assert folder.missing(kept) == kept[1:]
    assert folder.missing(again) == again


def test_the_precision_is_measured_once(tmp_path, monkeypatch):
    folder, plan = GridFolder(tmp_path / "grid"), replace(PLAN, config=FitConfig())
    with folder.working():
        for fastest, wanted in (("bf16-mixed", "bf16-mixed"), ("32-true", "bf16-mixed")):
            monkeypatch.setattr("chanscale.comparison.grid.find_precision", lambda _, f=fastest: f)
            assert folder.begin(plan, make_images()) == wanted


def test_a_grid_that_was_stopped_before_its_plan_was_written_can_be_begun(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    folder, plan = GridFolder(tmp_path / "grid"), replace(PLAN, config=FitConfig())
    with monkeypatch.context() as patch:
        patch.setattr("chanscale.comparison.grid.find_precision", stop)
        with pytest.raises(KeyboardInterrupt), folder.working():
            folder.begin(plan, make_images())
    (folder.out / ".grid.json.17.tmp").write_text("half")  # as one that is killed leaves it
    with folder.working():
        folder.begin(PLAN, make_images())
    assert sorted(path.name for path in folder.out.iterdir()) == ["cells", "grid.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="something else than a grid"), GridFolder(tmp_path).working():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with (
        pytest.raises(ArtifactError, match="is a file"),
        GridFolder(tmp_path / "precious.txt").working(),
    ):
        pass


def test_two_processes_cannot_work_in_one_folder(folder):
    with folder.working():
        with pytest.raises(ArtifactError, match="another process works in"), GridFolder(folder.out).working():
            pass
        assert (folder.out / ".lock").exists()
    assert not (folder.out / ".lock").exists()


def test_what_a_killed_process_left_is_swept(folder):
    (folder.cells / ".head-all-f0-s0.json.17.tmp").write_text("half")
    with folder.working():
        assert list(folder.cells.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "chanscale-grid/9"}'])
def test_a_damaged_grid_is_named(folder, text):
    (folder.out / "grid.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"grid\.json is (damaged|of another version)"):
        folder.read()


@pytest.mark.parametrize("lost", ["config", "folds", "images"])
def test_a_plan_that_lacks_something_is_damaged(folder, lost):
    noted = json.loads((folder.out / "grid.json").read_text())
    (folder.out / "grid.json").write_text(json.dumps({k: v for k, v in noted.items() if k != lost}))
    with folder.working(), pytest.raises(ArtifactError, match="is damaged; use another --out"):
        folder.begin(PLAN, make_images())


@pytest.mark.parametrize("lost", ["parameters", "macs", "test"])
def test_a_cell_that_lacks_figures_is_damaged(folder, lost):
    spec = PLAN.specs(Path("data"), make_images(), "32-true")[0]
    result = make_result(spec.cell, digest=spec.digest)
    del result[lost]
    assert read_cell(write_cell(folder.cells, result)) is None


def test_cells_that_fail_do_not_stop_others_and_leaving_early_stops_all():
    specs, stopped = PLAN.specs(Path("data"), make_images(), "32-true"), []
    ended = dict(run_cells(specs, lambda spec: f"no {spec.cell.fold}" if spec.cell.fold else None, jobs=3))
    assert len(ended) == len(specs)
    assert sum(error is None for error in ended.values()) == 8
    cells = run_cells(specs, lambda _: None, jobs=1, stop=lambda: stopped.append(1))
    list(cells)
    assert stopped == []
    waiting = run_cells(specs, lambda _: "x" * (not stopped), jobs=1, stop=lambda: stopped.append(1))
    next(waiting)
    waiting.close()
    assert len(stopped) <= 1  # one, unless all had ended before


# --- what is drawn


def draw_with(folder, cells, signal=None):
    for cell in cells:
        write_cell(folder.cells, make_result(cell, signal=(signal or {}).get(cell.method, 1.0)))
    return draw_grid(folder)


def test_a_whole_grid_is_drawn(folder):
    rows, damaged = draw_with(folder, PLAN.cells, {"head": 0.3})
    assert damaged == []
    assert [(row.method, row.size) for row in rows] == [
        ("head", 25), ("chanscale", 25), ("head", None), ("chanscale", None),
    ]  # fmt: skip
    assert rows[0].auc.value == pytest.approx(0.81)
    assert rows[0].difference.low > 0
    assert rows[1].difference is None
    assert {path.name for path in folder.out.iterdir()} == {
        "cells", "grid.json", "table.md", "cells.csv", "accuracy_size.png", "small_data.png",
    }  # fmt: skip
    table = (folder.out / "table.md").read_text()
    assert "| head | 25 | 6 | 1 | 0.810 [0.785, 0.835] | +0." in table
    assert "chosen on n validation images at most" in table
    assert "missing" not in table
    listed = list(csv.DictReader((folder.out / "cells.csv").read_text().splitlines()))
    assert len(listed) == 24
    assert {row["size"] for row in listed} == {"25", "all"}
    assert listed[0]["parameters_removed"] == "0.95"


def test_half_a_grid_is_drawn_and_says_so(folder):
    rows, _ = draw_with(folder, PLAN.cells[:3])
    assert [len(row.results) for row in rows] == [1, 1, 1]
    assert rows[2].difference.value != rows[2].difference.value  # nothing of ours to compare it with
    text = (folder.out / "table.md").read_text()
    assert "**21 cells are missing.**" in text
    assert "nan" not in text


def test_identical_scores_are_a_difference_of_exactly_nothing(folder):
    rows, _ = draw_with(folder, PLAN.cells)
    assert (rows[0].difference.value, rows[0].difference.low, rows[0].difference.high) == (0, 0, 0)
    assert "+0.000 [+0.000, +0.000]" in (folder.out / "table.md").read_text()


def test_a_difference_counts_common_cells_alone():
    cells = [Cell("head", None, fold, 0) for fold in range(3)] + [Cell("chanscale", None, 0, 0)]
    rows = make_rows([make_result(cell) for cell in cells], ["head", "chanscale"])
    assert len(rows[0].results) == 3
    assert rows[0].difference.value == 0


def test_a_damaged_cell_is_left_out_and_named(folder):
    (folder.cells / "head-n25-f0-s0.json").write_text("{")
    _, damaged = draw_with(folder, PLAN.cells[1:])
    assert [path.name for path in damaged] == ["head-n25-f0-s0.json"]
    assert "**1 cells are missing.**" in (folder.out / "table.md").read_text()


def test_a_figure_that_is_not_defined_is_left_empty():
    result = make_result(Cell("head", None, 0, 0)) | {"auc": None}
    text = to_markdown(make_rows([json.loads(json.dumps(result))], ["head"]), missing=0)
    assert "| head | all | 1 | 1 |  |  | 0.750 |" in text
    assert "validation images at most" not in text


def test_processor_seconds_stand_beside_seconds_where_a_cell_has_them():
    cells = [make_result(Cell("head", None, fold, 0)) for fold in range(2)]
    assert [row.to_cells()[-3:] for row in make_rows(cells, ["head"])] == [("3", "", "1.00")]
    cells[0]["processor_seconds"] = 2.4
    assert [row.to_cells()[-3:] for row in make_rows(cells, ["head"])] == [("3", "2", "1.00")]
    assert "processor_seconds" in to_csv(cells).splitlines()[0]


# --- tries


def draw_tries(*validations, fold=0, method="full"):
    """Return the results of tries, the default first, each with its own AUC and time."""
    cells = [Cell(method, None, fold, 0, lr) for lr in (None, 1e-3, 1e-1)]
    results = [make_result(cell, validation=value) for cell, value in zip(cells, validations, strict=False)]
    return [result | {"auc": 0.5 + i / 10, "seconds": i} for i, result in enumerate(results)]


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ((0.9, 0.8, 0.7), 0), ((0.7, 0.9, 0.8), 1), ((0.7, 0.8, 0.9), 2), ((0.9, 0.9, 0.9), 1), ((0.9, 0.7, 0.9), 0),
        ((None, None, 0.1), 2), ((None, 0.2, None), 1), ((None, None, None), 1),
    ],
)  # fmt: skip
def test_the_try_with_the_best_validation_counts_and_of_equals_the_lowest_rate(validations, best):
    tries = draw_tries(*validations)
    for order in (tries, tries[::-1]):
        (row,) = make_rows(order, ["full"])
        assert row.results == (tries[best],)
        assert (row.auc.value, row.mean("seconds")) == (tries[best]["auc"], best)
        listed = {r["lr"]: r["chosen"] for r in csv.DictReader(to_csv(order).splitlines())}
        assert listed == {str(r["lr"]): str(r is tries[best]) for r in tries}


@pytest.mark.parametrize("validations", [(0.7, 0.9, 0.8), (0.9, 0.9, 0.9)])
def test_no_test_figure_chooses_a_try(validations):
    tries = draw_tries(*validations)
    before = choose(tries)["cell"]
    for values in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.2, 0.1, 0.3), (0.2, 0.3, 0.1)):
        for result, value in zip(tries, values, strict=True):
            result |= {"auc": value, "accuracy": value}
            result["test"]["scores"] = [[no, yes] for yes, no in result["test"]["scores"]]
        assert choose(tries)["cell"] == before
    assert choose([{k: r[k] for k in ("cell", "lr", "validation_auc")} for r in tries])["cell"] == before


def test_each_fold_chooses_for_itself_and_a_difference_counts_chosen_tries():
    tries = draw_tries(0.7, 0.9, 0.8) + draw_tries(0.9, 0.7, fold=1)
    ours = [make_result(Cell("chanscale", None, fold, 0, lr), signal=signal, validation=signal)
            for fold in (0, 1) for lr, signal in ((None, 0.2), (1e-3, 0.6))]  # fmt: skip
    row, reference = make_rows([*tries, *ours], ["full", "chanscale"])
    assert [result["auc"] for result in row.results] == [0.6, 0.5]
    assert (row.tries, reference.tries) == ((2, 3), (2, 2))
    assert [row.to_cells()[3], reference.to_cells()[3]] == ["2-3", "2"]
    wanted = paired_difference(
        [(Scores.of(ours[1]), Scores.of(tries[1])), (Scores.of(ours[3]), Scores.of(tries[3]))]
    )
    assert row.difference == wanted
    assert row.difference.value < 0
    assert len(to_csv([*tries, *ours]).splitlines()) == 1 + 9


def test_tries_are_drawn_from_their_files(folder):
    for lr, validation in ((None, 0.7), (1e-3, 0.8), (1e-1, 0.6)):
        write_cell(folder.cells, make_result(Cell("full", None, 0, 0, lr), validation=validation))
    (row,), damaged = draw_grid(folder)
    assert damaged == []
    assert [result["cell"]["lr"] for result in row.results] == [1e-3]
    assert "| full | all | 1 | 3 |" in (folder.out / "table.md").read_text()
    listed = list(csv.DictReader((folder.out / "cells.csv").read_text().splitlines()))
    assert {row["lr"]: row["chosen"] for row in listed} == {"0.01": "False", "0.001": "True", "0.1": "False"}


def test_a_cell_from_before_there_were_tries_is_the_default(folder):
    cell = PLAN.cells[0]
    old = make_result(cell)
    del old["lr"]
    old["cell"] = {name: value for name, value in old["cell"].items() if name != "lr"}
    path = folder.cells / f"{cell.name}.json"
    path.write_text(json.dumps(old))
    assert read_cell(path) == old
    (row,), damaged = draw_grid(folder)
    assert (row.results, row.tries, damaged) == ((old,), (1, 1), [])


def test_cells_of_other_test_images_are_not_compared():
    one, other = make_result(Cell("chanscale", None, 0, 0)), make_result(Cell("head", None, 0, 0))
    other["test"]["names"] = other["test"]["names"][::-1]
    with pytest.raises(ArtifactError, match="chanscale and head, fold 0, seed 0, have other test images"):
        make_rows([one, other], ["head", "chanscale"])


def test_nothing_to_draw_is_an_error(folder, tmp_path):
    with pytest.raises(ArtifactError, match="nothing to draw"):
        draw_grid(folder)
    with pytest.raises(ArtifactError, match="there is no grid at"):
        draw_grid(GridFolder(tmp_path / "nowhere"))


def test_a_baseline_at_a_budget_of_its_own_is_compared_with_ours_at_the_same():
    signals = {"chanscale": 1.5, "chanscale@0.99": 0.8, "random": 0.2, "random@0.99": 0.2, "random@0.9": 0.2}

    def compare(*methods):
        cells = [make_result(Cell(method, None, 0, 0), signal=signals[method]) for method in methods]
        rows = make_rows(cells, methods)
        return {row.method: (row.ours, row.difference) for row in rows}, to_markdown(rows, missing=0)

    rows, text = compare(*signals)
    assert [ours for ours, _ in rows.values()] == [
        "chanscale", "chanscale", "chanscale", "chanscale@0.99", "chanscale",
    ]  # fmt: skip
    assert rows["random"][1].value > rows["random@0.99"][1].value > 0
    assert rows["random"][1].value == rows["random@0.9"][1].value
    assert "AUC of chanscale less" in text
    assert "For random@0.99, ours is that of the same budget." in text
    rows, text = compare("chanscale", "random", "random@0.99")
    assert rows["random"] == rows["random@0.99"]
    assert "same budget" not in text


def test_any_method_may_stand_where_ours_does_and_nothing_is_written(folder):
    usual, _ = draw_with(folder, PLAN.cells, {"head": 0.3})
    before = {path: path.read_bytes() for path in folder.out.rglob("*") if path.is_file()}
    rows, damaged = compare_with(folder, "head")
    assert damaged == []
    assert {row.ours for row in rows} == {"head"}
    assert [row.difference is None for row in rows] == [row.method == "head" for row in rows]
    assert rows[1].difference.value == -usual[0].difference.value < 0
    assert {path: path.read_bytes() for path in folder.out.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="no cell of full; there are cells of head, chanscale"):
        compare_with(folder, "full")


def rows_that_keep(kept):
    """Rows of one cell each; `kept`: the parameters that each method keeps."""
    size = make_result(Cell("head", None, 0, 0))["parameters"]
    results = [
        make_result(Cell(method, None, 0, 0)) | {"parameters": size | {"kept": count}}
        for method, count in kept.items()
    ]
    return make_rows(results, [*kept])


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_an_interval_of_two_folds_which_spans_nearly_everything_is_not_drawn(folds):
    rows = make_rows([make_result(Cell("head", None, fold, 0)) for fold in range(folds)], ["head"])
    [axes] = draw_accuracy_size(rows).axes
    [[_, _, [arm]]] = [container.lines for container in axes.containers]
    low, high = arm.get_segments()[0][:, 1]
    wanted = (rows[0].auc.low, rows[0].auc.high) if folds > 2 else (rows[0].auc.value,) * 2
    assert (low, high) == pytest.approx(wanted)


def test_many_methods_look_different_and_a_line_joins_one_at_its_budgets():
    methods = [
        "head", "best-layer", "full", "last-block", "scratch", "scale", "bias", "random", "taylor", "magnitude",
        "random@0.99", "chanscale", "chanscale@0.99", "chanscale+round_to=1",
    ]  # fmt: skip
    figure = draw_accuracy_size(rows_that_keep({method: 2**-place for place, method in enumerate(methods)}))
    [axes], [legend] = figure.axes, figure.legends
    assert [text.get_text() for text in legend.texts] == methods
    marks = [container.lines[0] for container in axes.containers]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == len(methods)
    lines = [line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 2]
    looks = dict(zip(methods, marks, strict=True))
    for line, method in zip(lines, ("random", "chanscale"), strict=True):
        places = [methods.index(f"{method}@0.99"), methods.index(method)]
        assert line.get_xdata().tolist() == pytest.approx(
            [2**-place for place in sorted(places, reverse=True)]
        )
        assert {line.get_color()} == {looks[name].get_color() for name in (method, f"{method}@0.99")}


def test_small_data_are_drawn_of_methods_that_were_run_on_several_numbers():
    def drawn(*cells):
        rows = make_rows([make_result(Cell(method, size, 0, 0)) for method, size in cells], ["head", "full"])
        [axes] = draw_small_data(rows).axes
        return axes.get_legend_handles_labels()[1]

    assert drawn(("head", 50), ("head", None), ("full", None)) == ["head"]
    assert drawn(("head", 50), ("full", None)) == ["head", "full"]


def test_methods_that_keep_as_many_stand_side_by_side():
    kept = {"head": 1000, "full": 1000, "scale": 990, "bias": 1070, "chanscale": 500}
    [axes] = draw_accuracy_size(rows_that_keep(kept)).axes
    places = [container.lines[0].get_xdata()[0] for container in axes.containers]
    apart = np.diff(np.log(sorted(places[:4])))
    assert (apart > 0.07).all()
    assert np.mean(np.log(places[:4])) == pytest.approx(np.mean(np.log([*kept.values()][:4])))
    assert places[4] == pytest.approx(500)
    assert axes.get_xlabel().endswith("side by side)")


def test_more_seeds_of_the_same_folds_make_no_interval_narrower():
    def auc_of(folds, seeds):
        cells = [Cell("head", None, fold, seed) for fold in range(folds) for seed in range(seeds)]
        [row] = make_rows([make_result(cell) for cell in cells], ["head"])  # all seeds of a fold agree
        assert (row.folds, len(row.results)) == (folds, folds * seeds)
        return row.auc

    once, often = auc_of(3, 1), auc_of(3, 10)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    of_one = auc_of(1, 3)
    assert of_one.value == pytest.approx(0.8)
    assert math.isnan(of_one.low)


def test_a_fold_counts_as_its_others_do_however_many_seeds_it_has():
    cells = [Cell("head", None, 0, 0), Cell("head", None, 0, 1), Cell("head", None, 2, 0)]
    [row] = make_rows([make_result(cell) for cell in cells], ["head"])
    assert row.auc.value == pytest.approx((0.80 + 0.82) / 2)


@pytest.mark.parametrize(("aucs", "high"), [((0.8, 0.99), 1.0), ((0.8, 0.81, 0.8), 0.818)])
def test_no_interval_of_an_auc_goes_past_1(aucs, high):
    cells = [make_result(Cell("head", None, fold, 0)) | {"auc": auc} for fold, auc in enumerate(aucs)]
    [row] = make_rows(cells, ["head"])
    assert row.auc.value == pytest.approx(np.mean(aucs))
    assert row.auc.high == pytest.approx(high, abs=1e-3)
    assert 0 <= row.auc.low < row.auc.value
