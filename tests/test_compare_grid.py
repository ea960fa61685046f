"""What a grid holds, what it refuses, and what is drawn from the cells that are there."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chanscale.comparison.cells import FORMAT, Cell, CellSpec, digest_images, read_cell, write_cell
from chanscale.comparison.drawing import draw_grid
from chanscale.comparison.grid import GridFolder, Plan
from chanscale.comparison.methods import configure, find_reference, parse_methods
from chanscale.comparison.processes import run_cells
from chanscale.comparison.table import make_rows, to_markdown
from chanscale.config import FitConfig
from chanscale.errors import ArtifactError, ConfigError, SplitError
from test_compare_folds import make_images

CONFIG = FitConfig(precision="32-true", group_pattern="^(\\d+)_")
PLAN = Plan(("head", "chanscale"), (25, None), 3, (0, 1, 2), (0, 1), CONFIG)


def make_result(cell: Cell, *, signal=1.0, digest="d") -> dict:
    """What a cell might come to; the same images and noise in every method."""
    rng = np.random.default_rng((cell.fold, cell.seed))
    labels = np.arange(30) % 2
    score = 1 / (1 + np.exp(-(signal * (2 * labels - 1) + rng.normal(size=30))))
    names = [f"{cell.fold}_{index}.png" for index in range(30)]
    size = {"trunk": 1000, "kept": 50, "removed": 0.95}
    return {
        "format": FORMAT, "digest": digest, "cell": vars(cell), "classes": ["no", "yes"], "auc": 0.8 + 0.01 * cell.fold,
        "accuracy": 0.75, "validation_auc": 0.9, "parameters": size, "macs": size, "seconds": 3.0,
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


def test_methods_are_known_ones_each_once():
    known = ("head", "full")
    got = parse_methods(["full", "chanscale", "chanscale@0.990", "chanscale@0.99", "full"], known)
    assert got == ("full", "chanscale", "chanscale@0.99")
    for wrong in ("nonsense", "head@0.9", "chanscale@much", "chanscale@"):
        with pytest.raises(ConfigError, match="--methods must be among head, full, chanscale and"):
            parse_methods([wrong], known)


def test_ours_has_the_budget_in_its_name_and_every_cell_its_seed():
    assert configure("chanscale@0.99", CONFIG, seed=3) == CONFIG.model_copy(
        update={"budget": 0.99, "seed": 3}
    )
    assert configure("head", CONFIG, seed=3) == CONFIG.model_copy(update={"seed": 3})
    with pytest.raises(ConfigError, match="budget: Input should be less than 1"):
        configure("chanscale@2", CONFIG, seed=0)


def test_others_are_compared_with_ours_at_the_common_budget():
    assert find_reference(["head", "chanscale@0.99", "chanscale"]) == "chanscale"
    assert find_reference(["head", "chanscale@0.99"]) == "chanscale@0.99"
    assert find_reference(["head"]) is None


def test_a_spec_goes_through_a_pipe():
    images = make_images()
    for spec in PLAN.specs(Path("data"), images, "32-true"):
        again = CellSpec.from_json(spec.to_json())
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
    [({"sizes": (1000,)}, ConfigError, "use all"), ({"folds": 60, "chosen": (0,)}, SplitError, "too few for")],
)  # fmt: skip
def test_what_cannot_be_split_is_said_before_any_cell_runs(change, error, words):
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


def test_the_precision_is_measured_once(tmp_path, monkeypatch):
    folder, plan = GridFolder(tmp_path / "grid"), replace(PLAN, config=FitConfig())
    with folder.working():
        for fastest, wanted in (("bf16-mixed", "bf16-mixed"), ("32-true", "bf16-mixed")):
            monkeypatch.setattr("chanscale.comparison.grid.find_precision", lambda _, f=fastest: f)
            assert folder.begin(plan, make_images()) == wanted


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
    assert "| head | 25 | 6 | 0.810 [0.801, 0.819] | +0." in table
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
    assert "| head | all | 1 |  |  | 0.750 |" in text


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
