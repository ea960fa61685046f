"""The command, with cells in processes of their own; the network is tiny, and everything else is real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_cell
from chanscale import cli
from chanscale.cli_options import merge_config
from chanscale.compare_command import _describe_rest
from chanscale.comparison import processes
from chanscale.comparison.cells import Cell, CellSpec, digest_images, read_cell, run_cell
from chanscale.comparison.methods import configure
from chanscale.data import open_images
from chanscale.data.splits import split_images
from chanscale.errors import DataError
from chanscale.metrics import mean_auc
from chanscale.pipeline import scale_and_select
from test_cli import OPTIONS, draw, error_of, loaded_by_help, words

CONFIG = {
    "backbone": "tiny", "image_size": 32, "budget": 0.5, "round_to": 1, "scale_epochs": 2, "refine_epochs": 1,
    "precision": "32-true", "group_pattern": "^(\\d+)_", "batch_size": 8, "micro_batch": 8, "workers": 0,
    "speed": "off",
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """The tiny backbone, and methods that fail, here and in the processes of cells."""
    tiny_cell.register(monkeypatch.setitem, monkeypatch.setattr)
    monkeypatch.setattr(processes, "CELL_PROGRAM", tiny_cell.PROGRAM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("compare") / "data")


def compare(data, out, *arguments) -> int:
    return cli.run(["compare", str(data), "--out", str(out), *OPTIONS, "--folds=3", *arguments])


def spec_of(data, method, lr=None, **options) -> CellSpec:
    config = configure(method, merge_config(CONFIG | options, None), seed=0, lr=lr)
    listed = digest_images(open_images(data, group_pattern=config.group_pattern))
    return CellSpec(Cell(method, None, 0, config.seed, lr), data, listed, 1, 0, config)


def cells_of(out) -> dict[str, dict]:
    """The cells of a grid, without what a machine does differently each time."""
    found = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    for cell in found.values():
        del cell["seconds"], cell["processor_seconds"], cell["peak_memory_bytes"]
    return found


def wait_for_first_cell(process) -> None:
    """Read what a comparison of two cells says, until one of them is done."""
    line = ""
    while not line.startswith("1/2"):
        line = process.stderr.readline()
        assert line, "it ended before its first cell"


def require_interrupted(process, out) -> None:
    """Check that a comparison of head and another ends as one does whose first cell alone was done."""
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert rest.splitlines() == [
        "1 of 2 cells are there; the same command goes on", "interrupted; nothing half-written is left",
    ]  # fmt: skip
    assert {path.name for path in (out / "cells").iterdir()} == {"head-all-f0-s0.json"}
    assert not (out / ".lock").exists()


# --- one cell


def test_a_cell_of_ours_is_what_a_fit_of_the_same_split_gives(data, tiny):
    config = merge_config(CONFIG, None)
    result = run_cell(spec_of(data, "chanscale"))
    images = open_images(data, group_pattern=config.group_pattern)
    splits = split_images(images, validation=config.validation, test=config.test, seed=config.seed)

    run = scale_and_select("tiny", data, config=config)
    assert result["auc"] == run.metrics["auc"]["value"]
    assert result["accuracy"] == run.metrics["accuracy"]["value"]
    assert result["parameters"]["kept"] == run.metrics["parameters"]["kept"]
    assert result["macs"]["removed"] == run.metrics["macs"]["removed"]
    assert result["validation_auc"] == pytest.approx(run.metrics["validation_auc"], abs=1e-6)
    assert result["test"]["names"] == [images.records[i].name for i in splits.test]


@pytest.mark.parametrize("method", ["head", "full"])
def test_a_cell_of_a_baseline_keeps_all_and_says_what_it_saw(data, tiny, method):
    result = run_cell(spec_of(data, method))
    assert result["parameters"]["kept"] == result["parameters"]["trunk"]
    assert result["macs"]["removed"] == 0
    test = result["test"]
    scores, labels = np.array(test["scores"]), np.array(test["labels"])
    assert result["auc"] == mean_auc(scores, labels)
    assert len(set(test["groups"])) * 2 == len(labels) == result["images"]["test"]
    assert sum(result["images"].values()) == 48
    assert result["lr"] == {"head": None, "full": 3e-5}[method]
    assert result["peak_memory_bytes"] > 2**26


def test_another_budget_leaves_fewer_parameters(data, tiny):
    removed = run_cell(spec_of(data, "chanscale", budget=0.8))["parameters"]["removed"]
    assert removed >= 0.8


def test_an_option_in_the_name_of_ours_is_that_of_its_cell(data, tiny):
    kept = run_cell(spec_of(data, "chanscale@0.7+round_to=4"))["parameters"]["kept"]
    assert kept == run_cell(spec_of(data, "chanscale", budget=0.7, round_to=4))["parameters"]["kept"]
    assert kept != run_cell(spec_of(data, "chanscale"))["parameters"]["kept"]


@pytest.mark.parametrize("method", ["random", "taylor-frozen"])
def test_a_budget_in_the_name_of_a_baseline_is_that_of_its_cell(data, tiny, method):
    named, given = run_cell(spec_of(data, f"{method}@0.7")), run_cell(spec_of(data, method, budget=0.7))
    assert named["test"] == given["test"]
    assert named["parameters"] == given["parameters"] != run_cell(spec_of(data, method))["parameters"]


@pytest.mark.parametrize(
    ("method", "rates"), [("full", (1e-5, 3e-5, 1e-4)), ("chanscale", (3e-3, 1e-2, 3e-2))]
)
def test_a_try_is_trained_at_its_rate_and_the_default_is_the_middle(data, tiny, method, rates):
    results = {lr: run_cell(spec_of(data, method, lr)) for lr in (None, *rates)}
    assert [result["lr"] for result in results.values()] == [rates[1], *rates]
    assert [result["cell"]["lr"] for result in results.values()] == list(results)
    scores = [json.dumps(results[lr]["test"]["scores"]) for lr in (None, *rates)]
    assert scores[0] == scores[2]
    assert len(set(scores)) == 3


@pytest.mark.parametrize("method", ["random", "select-only"])
def test_channels_of_ours_are_lent_to_a_cell_that_would_find_the_same(data, tiny, method):
    ours = run_cell(spec_of(data, "chanscale"))
    alone, lent = spec_of(data, method), replace(spec_of(data, method), ours=ours)
    assert lent.digest == alone.digest
    assert CellSpec.from_json(lent.to_json()) == lent

    found, told = run_cell(alone), run_cell(lent)
    for name in ("test", "validation_auc", "parameters", "macs", "images", "lr", "digest"):
        assert told[name] == found[name]
    assert told["seconds"] > ours["seconds"]
    assert told["processor_seconds"] > ours["processor_seconds"]
    assert told["peak_memory_bytes"] >= ours["peak_memory_bytes"]


def test_what_training_warned_of_stands_in_the_cell(data, tiny):
    assert "warnings" not in run_cell(spec_of(data, "chanscale"))
    (told,) = run_cell(spec_of(data, "chanscale", budget=0.9, round_to=4, depth="full"))["warnings"]
    assert told.startswith("--round-to 4 leaves little to select")


def test_images_that_have_changed_are_noticed(data, tiny):
    spec = spec_of(data, "head")
    with pytest.raises(DataError, match="have changed since the grid was begun"):
        run_cell(CellSpec(**(vars(spec) | {"images": "other"})))


# --- the command


def test_help_loads_nothing_heavy():
    assert loaded_by_help("compare") == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "Missing option '--out'"),
        (["compare", "--out", "grid"], "name the images, DATA; or draw the table"),
        (["compare", "--out", "grid", "--table"], "there is no grid at grid"),
        (["compare", "--out", "grid", "--table", "--against", "head"], "there is no grid at grid"),
        (["compare", "d", "--out", "grid", "--against", "head"], "--against goes with --table"),
        (["compare", "nowhere", "--out", "grid"], "nowhere does not exist"),
        (["compare", "d", "--out", "grid", "--methods", "best"], "--methods must be among head, "),
        (["compare", "d", "--out", "grid", "--methods", ""], "--methods must be"),
        (["compare", "d", "--out", "grid", "--sizes", "few"], "--sizes must be whole numbers from 1"),
        (["compare", "d", "--out", "grid", "--sizes", "0"], "--sizes must be whole numbers from 1"),
        (["compare", "d", "--out", "grid", "--seeds", ""], "--seeds must be whole numbers from 0"),
        (["compare", "d", "--out", "grid", "--only-folds", "5"], "--only-folds must be below 5"),
        (["compare", "d", "--out", "grid", "--methods", "chanscale+best=1"], "chanscale+best=1: there is no option"),
        (["compare", "d", "--out", "grid", "--tries", "0"], "Invalid value for '--tries'"),
        (["compare", "d", "--out", "grid", "--tries", "4"], "Invalid value for '--tries'"),
        (["compare", "d", "--out", "grid", "--folds", "0"], "Invalid value for '--folds'"),
        (["compare", "d", "--out", "grid", "--backbone", "resnet1"], "must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_no_cell_could_run_with_leaves_nothing(data, tiny, tmp_path, capsys):
    for options, message in (
        (["--sizes=500"], "--sizes 500 is more than the"),
        (["--folds=20"], "too few for --folds 20"),
        (["--methods=chanscale@1.5"], "budget: Input should be less than 1"),
        (["--sensitivity=0.9"], "every cell has sensitivity=None; leave --sensitivity out"),
        (["--calibrate"], "every cell has calibrate=False; leave --calibrate out"),
        (["--speed=auto"], "every cell has speed='off'; leave --speed out"),
        (["--out", str(data / "grid")], "lies in the images' folder"),
    ):
        out = ["--out", str(tmp_path / "grid")] if "--out" not in options else []
        assert message in error_of(capsys, ["compare", data, *OPTIONS, *out, *options])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ran", "left", "said"),
    [(1, 0, ""), (1, 1, ""), (2, 4, "; about 2 min to go"), (1, 200, "; about 3 h to go")],
)
def test_what_is_left_is_told_where_it_is_minutes(ran, left, said):
    assert _describe_rest(60.0, ran, left) == said


def test_what_several_cells_warn_of_is_said_once(data, tiny, tmp_path, capsys):
    asked = [
        "--methods=chanscale",
        "--only-folds=0,1",
        "--tries=1",
        "--depth=full",
        "--round-to=4",
        "--budget=0.9",
    ]
    assert compare(data, tmp_path / "grid", *asked) == 0
    err = words(capsys)[1]
    assert len(re.findall(r"^\d/2 chanscale-.*: AUC", err, re.MULTILINE)) == 2
    assert err.count("warning: --round-to 4 leaves little to select") == 1


def test_a_grid_runs_in_processes_two_at_a_time_as_one_at_a_time_and_resumes(
    data, tiny, tmp_path, capsys, monkeypatch
):
    # Two at a time have half of the threads each, and sums over other numbers of threads round in another way.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    asked = ["--methods=head,chanscale", "--only-folds=1", "--sizes=10", "--tries=1"]
    assert compare(data, tmp_path / "two", *asked, "--jobs=2") == 0
    out, err = words(capsys)
    assert len([line for line in err.splitlines() if re.match(r"\d/2 .*: AUC \d", line)]) == 2
    assert all(word in out for word in ("method", "test AUC", "ours", "removed", "head", "Table and plots: "))
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "cells", "grid.json", "table.md", "cells.csv", "accuracy_size.png",
    }  # fmt: skip
    # One at a time, and in two goes: first without one of the methods.
    assert compare(data, tmp_path / "one", *asked[1:], "--methods=head") == 0
    kept = tmp_path / "one" / "cells" / "head-n10-f1-s0.json"
    written = kept.stat().st_mtime_ns
    words(capsys)
    assert compare(data, tmp_path / "one", *asked) == 0
    begun = "2 cells: 2 methods x 1 size x 1 fold x 1 seed; 1 is there"
    assert words(capsys)[1].splitlines()[0] == begun
    assert kept.stat().st_mtime_ns == written
    assert cells_of(tmp_path / "one") == cells_of(tmp_path / "two")
    assert cells_of(tmp_path / "one").keys() == {"head-n10-f1-s0", "chanscale-n10-f1-s0"}
    check_redrawing(tmp_path / "one", capsys)
    assert "was begun with budget=0.5, not 0.6" in error_of(
        capsys, ["compare", data, "--out", tmp_path / "one", *OPTIONS, "--folds=3", *asked, "--budget=0.6"]
    )


def test_a_grid_of_one_try_grows_to_three(data, tiny, tmp_path, capsys):
    out, asked = tmp_path / "grid", ["--methods=full", "--only-folds=0", "--sizes=10"]
    assert compare(data, out, *asked, "--tries=1") == 0
    assert "lr" not in "".join(path.name for path in (out / "cells").iterdir())
    written = (out / "cells" / "full-n10-f0-s0.json").stat().st_mtime_ns
    words(capsys)
    assert compare(data, out, *asked) == 0
    begun = "3 cells: 1 method x 1 size x 1 fold x 1 seed, up to 3 tries of each; 1 is there"
    assert words(capsys)[1].splitlines()[0] == begun
    assert (out / "cells" / "full-n10-f0-s0.json").stat().st_mtime_ns == written
    cells = cells_of(out)
    rates = {"full-n10-f0-s0": 3e-5, "full-n10-f0-s0-lr1e-05": 1e-5, "full-n10-f0-s0-lr0.0001": 1e-4}
    assert {name: cell["lr"] for name, cell in cells.items()} == rates
    assert "| full | 10 | 1 | 3 |" in (out / "table.md").read_text()
    assert all(cell["images"]["train"] == 10 >= cell["images"]["validation"] for cell in cells.values())


def check_redrawing(out, capsys):
    """The table alone needs neither images nor network, and comes out the same."""
    before = (out / "table.md").read_text()
    (out / "table.md").unlink()
    assert cli.run(["compare", "--out", str(out), "--table"]) == 0
    assert (out / "table.md").read_text() == before
    words(capsys)
    assert cli.run(["compare", "--out", str(out), "--table", "--against", "head"]) == 0
    assert "head less it" in " ".join(words(capsys)[0].split())


def test_a_failing_cell_does_not_stop_others(data, tiny, tmp_path, capsys):
    out = tmp_path / "grid"
    assert compare(data, out, "--methods=broken,killed,head", "--only-folds=0") == 1
    told, err = words(capsys)
    lines = {line.split()[1]: line for line in err.splitlines() if re.match(r"\d/3", line)}
    error = out / "cells" / "broken-all-f0-s0.error"
    assert lines["broken-all-f0-s0:"].endswith(
        f"failed: the loss became nan; use a lower --head-lr ({error})"
    )
    assert error.read_text() == "the loss became nan; use a lower --head-lr\n"
    assert "ended by SIGKILL; it may have lacked memory" in lines["killed-all-f0-s0:"]
    assert read_cell(out / "cells" / "head-all-f0-s0.json")
    assert "head" in told
    assert "**2 cells are missing.**" in (out / "table.md").read_text()


def test_a_grid_of_failures_ends_with_their_exit_code(data, tiny, tmp_path, capsys):
    assert compare(data, tmp_path / "grid", "--methods=broken", "--only-folds=0") == 1
    assert "nothing to draw" in words(capsys)[1].splitlines()[-1]


def test_an_interrupt_ends_the_cells_and_leaves_nothing_half_written(data, tmp_path):
    program = (
        "import signal, tiny_cell; tiny_cell.register()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from chanscale.comparison import processes; processes.CELL_PROGRAM = tiny_cell.PROGRAM\n"
        "from chanscale.cli import main; main()"
    )
    out = tmp_path / "grid"
    arguments = [
        str(data),
        "--out",
        str(out),
        *OPTIONS,
        "--folds=3",
        "--methods=head,endless",
        "--only-folds=0",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", program, "compare", *arguments],
        env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_for_first_cell(process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        require_interrupted(process, out)


def test_a_cell_ends_with_the_process_that_started_it(data):
    with subprocess.Popen(
        [*tiny_cell.PROGRAM, "nowhere"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        process.stdin.write(spec_of(data, "endless").to_json().encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) == 1
