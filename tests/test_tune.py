"""A search, from the command and from Python; the network is tiny, and everything else is real."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import chanscale
import tiny_backbone
import tiny_trial
from chanscale import cli
from chanscale.cli_options import merge_config
from chanscale.comparison import processes
from chanscale.comparison.cells import digest_images
from chanscale.config import FitConfig
from chanscale.data import open_images
from chanscale.data.splits import split_images
from chanscale.errors import ArtifactError, ConfigError, DataError, TrainingError
from chanscale.schedule import plan_epochs
from chanscale.tuning import search, trials
from chanscale.tuning.front import choose, find_front
from chanscale.tuning.space import SPACE, choose_options, to_options, to_params
from chanscale.tuning.stopping import WITNESSES, Rival, Stopped, TrialWatcher, falls_behind
from chanscale.tuning.study import mend_journal
from chanscale.tuning.trials import TrialSpec, read_trial, run_trial
from test_cli import HEAVY, OPTIONS, error_of, loaded_by_help, words
from test_compare import CONFIG

pytestmark = pytest.mark.skipif(find_spec("optuna") is None, reason="needs: pip install 'chanscale[tune]'")
FREE = {name: value for name, value in CONFIG.items() if name not in SPACE} | {"image_size": 32}
FREE_OPTIONS = [option for option in OPTIONS if not option.startswith("--budget")]
TRIALS = 5
MEASURED = ("seconds", "peak_memory_bytes")
"""What a machine does differently each time."""


@pytest.fixture
def tiny(monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture
def here(tiny, monkeypatch):
    return tiny_trial.run_here(monkeypatch.setattr)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("tune") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> SimpleNamespace:
    """A search in two figures: what came of it in one go."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        tiny_trial.run_here(patch.setattr)
        out, heard = tmp_path_factory.mktemp("tune") / "whole", []
        found = chanscale.tune(
            "tiny", data, out=out, trials=TRIALS, config=merge_config(FREE, None), on_trial=heard.append
        )
    return SimpleNamespace(found=found, out=out, heard=heard, told=read_json(out / "tuning.json"))


def draw(folder, patients=30, films=2) -> Path:
    """Write images of two classes, of which the second is a little brighter: no network is right of all."""
    rng = np.random.default_rng(4)
    for patient in range(patients):
        label = patient % 2
        path = folder / ("clear", "spot")[label] / f"{patient:03}_{{}}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        for film in range(films):
            pixels = rng.integers(0, 200, (32, 32), dtype=np.uint8)
            pixels[8:24, 8:24] += np.uint8(rng.integers(0, 20) + 6 * label)
            Image.fromarray(pixels).save(str(path).format(film))
    return folder


def tune(data, out, *arguments) -> int:
    return cli.run(["tune", str(data), "--out", str(out), *FREE_OPTIONS, *map(str, arguments)])


def read_json(path):
    return json.loads(path.read_text())


def trials_of(out) -> dict[str, dict]:
    """The files of all trials, without what is measured."""
    found = {path.name: read_json(path) for path in sorted((out / "trials").glob("*.json"))}
    return {name: {k: v for k, v in trial.items() if k not in MEASURED} for name, trial in found.items()}


def first_of(whole, count) -> dict[str, dict]:
    return dict(list(trials_of(whole.out).items())[:count])


def spec_of(data, rivals=(), **options) -> TrialSpec:
    config = merge_config(CONFIG | options, None)
    listed = digest_images(open_images(data, group_pattern=config.group_pattern))
    return TrialSpec(0, data, listed, (), config, ("budget",), rivals)


def make_result(number, auc, kept, state="complete") -> dict:
    return {"number": number, "state": state, "validation_auc": auc, "parameters": {"kept": kept}}


# --- what is searched


def test_all_that_can_be_searched_begins_at_the_defaults():
    names = choose_options(FitConfig(), None)
    assert names == tuple(SPACE)
    assert to_options(to_params(FitConfig(), names)) == {name: getattr(FitConfig(), name) for name in names}


def test_what_is_given_is_fixed_unless_it_is_named():
    config = FitConfig(budget=0.9, head_lr=2e-3)
    assert choose_options(config, None) == ("image_size", "pressure", "concavity", "refine_lr")
    assert choose_options(config, ["head_lr", "budget"]) == ("budget", "head_lr")
    assert to_options(to_params(config, ("budget", "head_lr"))) == {"budget": 0.9, "head_lr": 2e-3}


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({}, ["seed"], "--search must be among budget, .*Got 'seed'"),
        ({}, [], "all that can be searched is fixed"),
        ({name: getattr(FitConfig(), name) for name in SPACE}, None, "all that can be searched is fixed"),
        ({"budget": 0.5}, ["budget"], r"budget is searched from 0\.7 to 0\.99, .*Got budget=0\.5"),
        ({"image_size": 100}, ["image_size"], "in steps of 16, .*Got image_size=100"),
        ({"tolerance": 0.01}, None, "--tolerance looks for the smallest network itself"),
    ],
)
def test_what_cannot_be_searched_is_said(config, wanted, message):
    with pytest.raises(ConfigError, match=message):
        choose_options(FitConfig(**config), wanted)


# --- when a trial is stopped


def test_a_trial_falls_behind_the_median_of_those_no_larger():
    rivals = [Rival(10, (auc, auc)) for auc in (0.6, 0.7, 0.8, 0.9)]
    assert falls_behind([0.5, 0.74], 10, rivals)
    assert not falls_behind([0.5, 0.76], 10, rivals)
    assert not falls_behind([0.76, 0.5], 10, rivals)  # its best epoch counts
    assert not falls_behind([0.5], 9, rivals)  # they are larger
    assert not falls_behind([0.5], 10, rivals[: WITNESSES - 1])
    assert not falls_behind([0.5, 0.5, 0.5], 10, rivals)  # none of them has come this far


def test_what_is_stopped_is_beaten_by_one_no_larger():
    rng, count = np.random.default_rng(0), 0
    for _ in range(300):
        rivals = [Rival(float(rng.integers(5)), tuple(rng.random(3))) for _ in range(8)]
        aucs, cost = rng.random(rng.integers(1, 4)).tolist(), float(rng.integers(5))
        if falls_behind(aucs, cost, rivals):
            count += 1
            assert any(rival.cost <= cost and max(rival.aucs) > max(aucs) for rival in rivals)
    assert count > 50


def test_only_epochs_that_meet_the_budget_count_and_the_last_is_not_stopped():
    config = FitConfig(scale_epochs=2, refine_epochs=2)
    moments = list(plan_epochs(config))
    watcher = TrialWatcher([Rival(0, (0.9,) * 3)] * WITNESSES, of="parameters")
    row = {"validation_auc": 0.5, "parameters": 7}
    watcher.on_epoch(moments[0], row)
    assert watcher.aucs == []
    for moment in moments[1:3]:
        with pytest.raises(Stopped):
            watcher.on_epoch(moment, row)
    watcher.on_epoch(moments[3], row)
    assert watcher.aucs == [0.5] * 3


def test_a_trial_that_is_stopped_says_what_it_was(data, tiny):
    rivals = tuple(Rival(0.0, (1.1, 1.1)) for _ in range(WITNESSES))
    result = run_trial(spec_of(data, rivals))
    assert result["state"] == "stopped"
    assert result["epochs"] == CONFIG["scale_epochs"]
    assert result["aucs"] == [result["validation_auc"]]
    whole = run_trial(spec_of(data))
    assert whole["state"] == "complete"
    assert whole["aucs"][0] == result["aucs"][0]
    assert len(whole["aucs"]) == 1 + CONFIG["refine_epochs"]
    assert whole["validation_auc"] == max(whole["aucs"])
    assert result["parameters"] == whole["parameters"]
    assert result["macs"]["kept"] == whole["macs"]["kept"]


def test_options_that_lead_to_no_network_are_a_result_and_other_errors_are_not(data, tiny, monkeypatch):
    def break_down(*_, **__):
        raise error

    monkeypatch.setattr(trials, "scale_and_select", break_down)
    error = TrainingError("the loss became nan;\n use a lower --head-lr")
    result = run_trial(spec_of(data))
    assert (result["state"], result["reason"]) == ("failed", "the loss became nan; use a lower --head-lr")
    error = DataError("001_0.png cannot be read")
    with pytest.raises(DataError, match="001_0"):
        run_trial(spec_of(data))


def test_a_budget_that_contradicts_the_depth_is_a_result_and_a_depth_that_is_none_an_error(data, tiny):
    """The first was drawn; the second is given to all trials, and each would fail."""
    result = run_trial(spec_of(data, depth="features.5", budget=0.01))
    assert result["state"] == "failed"
    assert "a trunk that ends behind features.5 has no more left than the budget leaves" in result["reason"]
    with pytest.raises(ConfigError, match="Got depth='nowhere' instead"):
        run_trial(spec_of(data, depth="nowhere"))


def test_a_spec_is_that_of_its_line(data):
    spec = spec_of(data, (Rival(3.0, (0.5, 0.75)),))
    again = TrialSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest == spec.digest
    assert spec_of(data, budget=0.6).digest != spec.digest


def test_images_that_have_changed_are_noticed(data, tiny):
    with pytest.raises(DataError, match="have changed since the search was begun"):
        run_trial(TrialSpec(**(vars(spec_of(data)) | {"images": "other"})))


# --- the front


def test_the_front_is_all_that_none_beats():
    rng = np.random.default_rng(1)
    for _ in range(100):
        results = [
            make_result(
                n, float(rng.integers(6)) / 6, int(rng.integers(6)), rng.choice(["complete", "stopped"])
            )
            for n in range(9)
        ]
        front = find_front(results, of="parameters")
        figures = [(result["validation_auc"], -result["parameters"]["kept"]) for result in front]
        assert figures == sorted(figures, reverse=True)[::-1]
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(figures))
        for result in results:
            own = result["validation_auc"], -result["parameters"]["kept"]
            if result["state"] == "complete":
                assert any(auc >= own[0] and size >= own[1] for auc, size in figures)
            else:
                assert result not in front


def test_the_smallest_close_to_the_best_is_chosen():
    front = [make_result(0, 0.80, 1), make_result(1, 0.895, 2), make_result(2, 0.90, 9)]
    assert [choose(front, within=share)["number"] for share in (0.0, 0.01, 0.2)] == [2, 1, 0]


# --- a whole search


def test_a_search_leaves_figures_a_front_a_picture_and_configurations(whole):
    assert {path.name for path in whole.out.iterdir()} == {
        "search.json", "journal.log", "trials", "tuning.json", "pareto.png", "front", "best.yaml",
    }  # fmt: skip
    told = whole.told
    assert told["objectives"] == ["validation_auc", "parameters"]
    assert [trial["number"] for trial in told["trials"]] == list(range(TRIALS))
    assert sum(told["count"].values()) == TRIALS
    assert told["front"] == [result["number"] for result in find_front(told["trials"], of="parameters")]
    assert {path.name for path in (whole.out / "front").iterdir()} == {
        f"trial-{number}.yaml" for number in told["front"]
    }
    with Image.open(whole.out / "pareto.png") as picture:
        assert picture.width > 500
    assert [(end.number, end.done, end.total, end.error) for end in whole.heard] == [
        (number, number + 1, TRIALS, None) for number in range(TRIALS)
    ]


def test_the_first_trial_is_what_was_given_and_the_others_differ(whole):
    first, *others = (trial["options"] for trial in whole.told["trials"])
    names = ("budget", "pressure", "concavity", "refine_lr", "head_lr")
    assert first == {name: getattr(FitConfig(), name) for name in names}
    assert len({tuple(options.items()) for options in (first, *others)}) == TRIALS
    for options in others:
        assert all(SPACE[name].low <= value <= SPACE[name].high for name, value in options.items())


def test_it_says_that_its_figure_is_optimistic_and_names_no_test_image(whole, data):
    assert re.match(
        f"The validation AUC of the best of {TRIALS} trials is optimistic", whole.told["notes"][0]
    )
    assert whole.told["images"]["test_unseen"] > 0
    test = names_on_side(data, "test")
    texts = [path.read_text() for path in whole.out.rglob("*") if path.suffix in {".json", ".log", ".yaml"}]
    assert test
    assert not [name for name in test for text in texts if name in text]
    assert not [trial for trial in whole.told["trials"] if {"auc", "test"} & trial.keys()]


def names_on_side(data, side) -> list[str]:
    config = merge_config(FREE, None)
    images = open_images(data, group_pattern=config.group_pattern)
    splits = split_images(images, validation=config.validation, test=config.test, seed=config.seed)
    return [images.records[index].name for index in getattr(splits, side)]


def test_test_images_decide_nothing(whole, data, here, tmp_path):
    """In place of each there is a file that cannot even be read: the search is the same."""
    noise = shutil.copytree(data, tmp_path / "noise")
    for name in names_on_side(data, "test"):
        (noise / name).write_bytes(b"not an image")
    assert tune(noise, tmp_path / "out", "--trials=3") == 0
    assert trials_of(tmp_path / "out") == first_of(whole, 3)
    (noise / names_on_side(data, "validation")[0]).write_bytes(b"not an image")
    with pytest.raises(TrainingError, match=r"trial 0 failed, and no other has ended: .*\.png"):
        chanscale.tune("tiny", noise, out=tmp_path / "broken", trials=1, config=merge_config(FREE, None))


def test_fit_takes_what_was_chosen_and_comes_to_the_same_network(whole, data, tiny, tmp_path):
    best = next(trial for trial in whole.told["trials"] if trial["number"] == whole.told["best"])
    assert (
        cli.run(["fit", str(data), "--config", str(whole.out / "best.yaml"), "--out", str(tmp_path / "run")])
        == 0
    )
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["validation_auc"] == pytest.approx(best["validation_auc"], abs=1e-6)
    assert metrics["parameters"]["kept"] == best["parameters"]["kept"]
    with (tmp_path / "run" / "splits.csv").open() as file:
        sides = {row["name"]: row["split"] for row in csv.DictReader(file)}
    assert {name for name, side in sides.items() if side == "test"} == set(names_on_side(data, "test"))
    assert metrics["n"] == whole.told["images"]["test_unseen"]


def test_each_point_of_the_front_has_its_configuration(whole):
    by_number = {trial["number"]: trial for trial in whole.told["trials"]}
    for number in whole.told["front"]:
        config = FitConfig.read(whole.out / "front" / f"trial-{number}.yaml")
        assert {name: getattr(config, name) for name in by_number[number]["options"]} == by_number[number][
            "options"
        ]
    assert FitConfig.read(whole.out / "best.yaml") == whole.found.best


def test_with_the_budget_given_the_auc_is_all_that_counts(data, here, tmp_path, capsys):
    out = tmp_path / "out"
    assert tune(data, out, "--trials=3", "--budget=0.8", "--json") == 0
    told = json.loads(words(capsys)[0])
    assert told.pop("folder") == str(out)
    assert told == read_json(out / "tuning.json")
    assert told["objectives"] == ["validation_auc"]
    assert told["front"] == [told["best"]]
    best = max(trial["validation_auc"] for trial in told["trials"] if trial["state"] == "complete")
    assert told["trials"][told["best"]]["validation_auc"] == best
    assert not (out / "pareto.png").exists()
    assert FitConfig.read(out / "best.yaml").budget == 0.8


def pretend(spec) -> dict:
    """What a trial might come to whose best learning rate is 0.01, and whose AUC falls with what is removed."""
    kept = round(1e6 * (1 - spec.config.budget))
    top = 0.85 - 0.05 * (math.log10(spec.config.refine_lr) + 2) ** 2 + 0.02 * math.log10(kept / 1e5)
    watcher, state = TrialWatcher(spec.rivals, of="parameters"), "complete"
    try:
        for moment in plan_epochs(spec.config):
            row = {"validation_auc": top - 0.1 / (moment.epoch + 1), "parameters": kept}
            watcher.on_epoch(moment, row)
    except Stopped:
        state = "stopped"
    size = {"kept": kept, "removed": spec.config.budget}
    return {
        "format": trials.FORMAT, "number": spec.number, "state": state, "validation_auc": max(watcher.aucs),
        "parameters": size, "macs": size, "options": {name: getattr(spec.config, name) for name in spec.searched},
        "aucs": watcher.aucs, "epochs": 0, "seconds": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_longer_search_draws_what_is_better_and_stops_what_is_worse(
    data, here, tmp_path, monkeypatch, jobs
):
    begun = [Event() for _ in range(40)]

    def in_turn(spec):
        """End once `jobs` are under way, so that trials end in their order, however the threads run."""
        begun[spec.number].set()
        assert begun[min(spec.number + jobs, 40) - 1].wait(60)
        return pretend(spec)

    monkeypatch.setattr(trials, "run_trial", in_turn)
    config = merge_config(FREE | {"refine_epochs": 4}, None)
    found = chanscale.tune(
        "tiny", data, out=tmp_path / "t", trials=40, search=["budget", "refine_lr"], config=config, jobs=jobs
    )
    told = found.figures["trials"]
    assert [trial["number"] for trial in told] == list(range(40))
    assert found.figures["count"]["stopped"] > 2
    assert found.figures["count"]["complete"] > 10
    distances = [abs(math.log10(trial["options"]["refine_lr"]) + 2) for trial in told]
    assert np.mean(distances[20:]) < 0.7 * np.mean(distances[1:7])
    assert found.figures["front"] == [result["number"] for result in find_front(told, of="parameters")]
    assert len(found.figures["front"]) > 2
    removed = [trial["options"]["budget"] for trial in told]
    assert min(removed[20:]) < 0.9
    assert max(removed[20:]) > 0.97


def test_a_trial_that_led_to_no_network_is_counted_and_not_drawn(data, here, tmp_path, monkeypatch):
    def fail_once(spec):
        result = pretend(spec)
        if spec.number == 1:
            told = ("format", "number", "options", "aucs", "epochs", "seconds")
            return {name: result[name] for name in told} | {
                "state": "failed",
                "reason": "the loss became nan",
            }
        return result

    monkeypatch.setattr(trials, "run_trial", fail_once)
    config = merge_config(FREE, None)
    found = chanscale.tune("tiny", data, out=tmp_path / "t", trials=4, search=["budget"], config=config)
    assert found.figures["count"] == {"complete": 3, "stopped": 0, "failed": 1}
    assert (tmp_path / "t/pareto.png").exists()


# --- stopped, and gone on with


def be_killed(arguments, number) -> None:
    """Run the command in a process that is killed in an epoch of trial `number`."""
    program = (
        "import os, signal, tiny_backbone, tiny_trial; tiny_backbone.register(); tiny_trial.run_here()\n"
        "from chanscale.tuning import trials\n"
        "run = trials.run_trial\n"
        "class Dying(trials.TrialWatcher):\n"
        "    def on_epoch(self, *_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def run_or_die(spec):\n"
        f"    if spec.number == {number}: trials.TrialWatcher = Dying\n"
        "    return run(spec)\n"
        "trials.run_trial = run_or_die\n"
        "from chanscale.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, check=False, env=environment()
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def test_killed_in_mid_trial_and_gone_on_with_is_undisturbed(whole, data, here, tmp_path, capsys):
    out = tmp_path / "again"
    be_killed(["tune", str(data), "--out", str(out), *FREE_OPTIONS, "--trials=4"], 2)
    assert list(trials_of(out)) == ["0000.json", "0001.json"]
    with (out / "journal.log").open("a") as file:
        file.write('{"op_code":5,"wor')  # as a process leaves it that is killed in a write
    (out / "journal.log.lock").symlink_to("journal.log")
    for left in (out / "trials" / ".0002.json.17.tmp", out / ".tuning.json.17.tmp"):
        left.write_text("half")
    assert tune(data, out, "--trials=4") == 0
    assert here[0].ran == [2, 3]
    assert words(capsys)[1].splitlines()[1].startswith("3/4 trial 2: ")
    assert trials_of(out) == first_of(whole, 4)
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".lock"]
    assert tune(data, out, f"--trials={TRIALS}") == 0  # more than at first
    assert here[1].ran == [4]
    assert trials_of(out) == trials_of(whole.out)
    for name in ("best.yaml", "search.json"):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes()


def test_the_same_command_again_runs_nothing_and_tells_the_whole(whole, data, here, capsys):
    journal = (whole.out / "journal.log").read_bytes()
    assert tune(data, whole.out, f"--trials={TRIALS}") == 0
    told, err = words(capsys)
    assert here[0].ran == []
    assert (whole.out / "journal.log").read_bytes() == journal
    assert err.endswith(f"; {TRIALS} are there\n")
    flat = " ".join(told.split())
    best = whole.told["best"]
    assert f"Best: trial {best}, the smallest within 0.01 of the best validation AUC." in flat
    assert "is optimistic" in flat
    assert re.search(r"Fit it: \S+ fit \S+data --config \S+best\.yaml --out RUN", flat)
    assert f"{TRIALS} trials: " in flat


def test_a_trial_whose_file_is_damaged_is_run_again(whole, data, here, tmp_path):
    out = shutil.copytree(whole.out, tmp_path / "out")
    (out / "trials" / "0001.json").write_text("{}")
    assert read_trial(out / "trials" / "0001.json") is None
    assert tune(data, out, f"--trials={TRIALS}") == 0
    assert here[0].ran == [1]
    assert trials_of(out) == trials_of(whole.out)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x/9"},
        {"number": 2},
        {"validation_auc": None},
        {"aucs": None},
        {"options": []},
        {"state": "failed"},
    ],
)
def test_what_is_no_trial_is_not_read(whole, tmp_path, change):
    trial = read_json(whole.out / "trials" / "0001.json")
    for facts, there in ((trial, True), (trial | change, False)):
        (tmp_path / "0001.json").write_text(json.dumps(facts))
        assert bool(read_trial(tmp_path / "0001.json")) == there


def test_a_trial_that_ended_before_it_was_noted_is_not_run_again(whole, data, here, tmp_path):
    out = shutil.copytree(whole.out, tmp_path / "out")
    lines = (out / "journal.log").read_text().splitlines(keepends=True)
    assert '"values":[' in lines[-1]
    (out / "journal.log").write_text("".join(lines[:-1]))
    assert tune(data, out, f"--trials={TRIALS}") == 0
    assert here[0].ran == []
    assert '"values":[' in (out / "journal.log").read_text().splitlines()[-1]


def test_a_lost_trial_costs_itself_and_the_next_run_completes_it(
    whole, data, tiny, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    tiny_trial.run_here(monkeypatch.setattr, {1})
    assert tune(data, out, "--trials=2") == 1
    err = words(capsys)[1].splitlines()
    error = out / "trials" / "0001.error"
    assert err[0].endswith("; 0 are there")
    assert err[2] == (
        f"1/2 trial 1: lost: the process was ended by SIGKILL; it may have lacked memory ({error})"
    )
    assert err[-1] == "1 of 2 trials were lost; the same command tries them again"
    tiny_trial.run_here(monkeypatch.setattr)
    assert tune(data, out, "--trials=2") == 0
    assert not error.exists()
    assert trials_of(out) == first_of(whole, 2)


def test_if_not_even_the_first_can_be_run_it_is_one_line(data, tiny, tmp_path, monkeypatch, capsys):
    tiny_trial.run_here(monkeypatch.setattr, {0})
    line = error_of(capsys, ["tune", data, "--out", tmp_path / "out", *FREE_OPTIONS])
    assert "trial 0 failed, and no other has ended: the process was ended by SIGKILL" in line


def test_an_interrupt_loses_the_running_trial_alone(data, tmp_path):
    program = (
        "import signal, tiny_backbone, tiny_trial; tiny_backbone.register()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from chanscale.tuning import search; search.TRIAL_PROGRAM = tiny_trial.PROGRAM\n"
        "from chanscale.cli import main; main()"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", program, "tune", str(data), "--out", str(out), *FREE_OPTIONS, "--trials=500"],
        stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stderr.readline().startswith("500 trials over budget, ")
        assert process.stderr.readline().startswith("1/500 trial 0: ")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        rest = process.stderr.read().splitlines()
        assert process.wait(60) == 130
    assert rest[-2:] == [
        "1 of 500 trials are there; the same command goes on", "interrupted; nothing half-written is left",
    ]  # fmt: skip
    assert [path.name for path in (out / "trials").iterdir()] == ["0000.json"]
    assert not (out / ".lock").exists()


def test_half_a_line_of_a_journal_is_taken_away_and_no_whole_one(tmp_path):
    journal = tmp_path / "journal.log"
    mend_journal(journal)
    assert not journal.exists()
    for text in ("", "a\n", "a\nbb\n"):
        journal.write_text(f"{text}half")
        mend_journal(journal)
        assert journal.read_text() == text
        mend_journal(journal)
        assert journal.read_text() == text


# --- what is refused


def test_help_loads_nothing_heavy():
    assert loaded_by_help("tune", (*HEAVY, "optuna")) == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "Missing argument 'DATA'"),
        (["tune", "d"], "Missing option '--out'"),
        (["tune", "nowhere", "--out", "t"], "nowhere does not exist"),
        (["tune", "d", "--out", "t", "--trials", "0"], "Invalid value for '--trials'"),
        (["tune", "d", "--out", "t", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["tune", "d", "--out", "t", "--within", "-1"], "Invalid value for '--within'"),
        (["tune", "d", "--out", "t", "--nonsense", "1"], "No such option: --nonsense"),
        (["tune", "d", "--out", "t", "--budget", "2"], "budget: Input should be less than 1"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search=seed"], "--search must be among budget, image_size, "),
        (["--search=,"], "all that can be searched is fixed"),
        (["--search=image_size"], "image_size is searched from 80 to 224"),
        (["--tolerance=0.01"], "--tolerance looks for the smallest network itself"),
        (["--within=0.5"], "`within` must be a difference of AUC"),
        (["--backbone=resnet1"], "must be one of"),
        (["--ray="], "--ray must be local, auto, host:port or ray://host:port"),
        (["--ray-cpus=2"], "--ray-cpus is for cells on Ray"),
        (["--validation=0.01", "--test=0.01", "--group-pattern=^(.)"], "no split of"),
    ],
)
def test_what_no_trial_could_run_with_leaves_nothing(data, here, tmp_path, capsys, options, message):
    assert message in error_of(capsys, ["tune", data, "--out", tmp_path / "t", *FREE_OPTIONS, *options])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_among_the_images_is_refused(data, here, capsys):
    line = error_of(capsys, ["tune", data, "--out", data / "t", *FREE_OPTIONS])
    assert "lies in the images' folder" in line


def test_no_trials_or_jobs_are_refused_in_python(data, here, tmp_path):
    for wrong, message in (({"trials": 0}, "1 trial at least"), ({"jobs": 0}, "--jobs must be 1 at least")):
        with pytest.raises(ConfigError, match=message):
            chanscale.tune("tiny", data, out=tmp_path / "t", config=merge_config(FREE, None), **wrong)
    assert list(tmp_path.iterdir()) == []


def test_other_options_than_it_was_begun_with_are_one_line(whole, data, here, capsys):
    again = ["tune", data, "--out", whole.out, *FREE_OPTIONS]
    before = trials_of(whole.out)
    for options, message in (
        (["--seed=1"], "was begun with seed=0, not 1"),
        (["--budget=0.8"], "was begun with budget=0.95, not 0.8"),
        (["--search=budget"], "was begun with search=['budget', "),
    ):
        assert message in error_of(capsys, [*again, *options])
    assert trials_of(whole.out) == before
    assert here[0].ran == []


def test_other_images_than_it_was_begun_with_are_one_line(whole, data, here, tmp_path, capsys):
    fewer = shutil.copytree(data, tmp_path / "data")
    (fewer / names_on_side(data, "train")[0]).unlink()
    line = error_of(capsys, ["tune", fewer, "--out", whole.out, *FREE_OPTIONS])
    assert "was begun with other images" in line


def test_a_folder_of_something_else_is_left_alone(data, here, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    line = error_of(capsys, ["tune", data, "--out", tmp_path, *FREE_OPTIONS])
    assert "holds something else than a search" in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("search.json", "{}"), ("search.json", '{"format": "x/9"}'), ("journal.log", "half\nnone\n")],
)
def test_a_damaged_folder_is_named(whole, data, here, tmp_path, name, text):
    out = shutil.copytree(whole.out, tmp_path / "out")
    (out / name).write_text(text)
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)} is (damaged|of another version)"):
        chanscale.tune("tiny", data, out=out, trials=TRIALS, config=merge_config(FREE, None))


def test_trials_without_their_journal_are_noticed(whole, data, here, tmp_path):
    out = shutil.copytree(whole.out, tmp_path / "out")
    (out / "journal.log").unlink()
    with pytest.raises(ArtifactError, match=r"trial 0 of .*trials is not that of .*journal\.log"):
        chanscale.tune("tiny", data, out=out, trials=TRIALS, config=merge_config(FREE, None))


def test_without_optuna_the_error_says_how_to_install_it(data, here, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    line = error_of(capsys, ["tune", data, "--out", tmp_path / "t", *FREE_OPTIONS])
    assert line.endswith("which is not installed here: pip install 'chanscale[tune]'")
    assert list(tmp_path.iterdir()) == []


def test_with_bad_images_skipped_the_split_is_that_of_a_fit(data, here, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / names_on_side(data, "train")[0]).write_bytes(b"not an image")
    assert tune(broken, tmp_path / "out", "--trials=1", "--skip-bad") == 0
    config = FitConfig.read(tmp_path / "out" / "best.yaml")
    run = chanscale.scale_and_select("tiny", broken, config=config)
    sides = read_json(tmp_path / "out" / "tuning.json")["images"]
    assert run.metrics["images"]["skipped"] == 1
    assert [run.metrics["images"][side] for side in ("train", "validation", "test")] == list(sides.values())
    [trial] = trials_of(tmp_path / "out").values()
    assert run.metrics["validation_auc"] == pytest.approx(trial["validation_auc"], abs=1e-6)


def test_the_program_of_a_trial_is_a_module_that_is_there():
    *python, module = search.TRIAL_PROGRAM
    assert python == [sys.executable, "-P", "-m"]
    assert (Path(chanscale.__file__).parent / "tuning" / f"{module.split('.')[-1]}.py").exists()


@pytest.mark.parametrize("program", [processes.CELL_PROGRAM, search.TRIAL_PROGRAM])
def test_a_trial_or_cell_runs_no_module_of_the_working_folder(tmp_path, program):
    (tmp_path / "beside.py").touch()
    flags = program[1 : program.index("-m")]
    command = [sys.executable, *flags, "-c", "import beside"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No module named 'beside'" in done.stderr
