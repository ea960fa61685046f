"""Cross-validation, from the command and from Python; the network is tiny, and everything else is real."""

import csv
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import chanscale
import tiny_backbone
from chanscale import cli
from chanscale.cli_options import merge_config
from chanscale.comparison.differences import paired_difference
from chanscale.crossval.answers import Answers
from chanscale.crossval.averaging import describe_average, judge_average
from chanscale.crossval.figures import judge_folds
from chanscale.crossval.plan import CrossPlan, Member, take
from chanscale.data import open_images
from chanscale.data.splits import read_splits
from chanscale.ensemble import load_ensemble
from chanscale.errors import ArtifactError, ConfigError, DataError, SplitError
from chanscale.evaluation import predict
from chanscale.metrics import mean_auc
from chanscale.progress import Watcher
from chanscale.run_images import load_images
from test_cli import OPTIONS, draw, error_of, files_below, words
from test_compare import CONFIG
from test_compare_folds import make_images

CONFIG_OF_ALL = merge_config(CONFIG | {"test": 0.2}, None)


@pytest.fixture
def tiny(monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("cross") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> SimpleNamespace:
    """Two folds, twice, with a fifth of the patients in none: what came of it in one go."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        out, heard = tmp_path_factory.mktemp("cross") / "whole", []
        found = chanscale.cross_validate(
            "tiny", data, out=out, folds=2, repeats=2, config=CONFIG_OF_ALL,
            on_fold=lambda member, done, total, metrics: heard.append((member.name, done, total, metrics["n"])),
        )  # fmt: skip
    return SimpleNamespace(found=found, out=out, heard=heard)


def run(data, out, *arguments) -> int:
    return cli.run(["cross-validate", str(data), "--out", str(out), *OPTIONS, "--folds=2", *arguments])


def read_table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def make_answers(signals=(1.0, 1.0, 1.0), *, folds=False, images=60, noise=1.0) -> Answers:
    """What models might say of images of two classes, one image a patient; each left out a third if `folds`."""
    source, rng = take(make_images(images), range(images)), np.random.default_rng(1)
    labels = source.labels
    shares = np.full((len(signals), images, 2), np.nan)
    for place, strength in enumerate(signals):
        score = 1 / (1 + np.exp(-(strength * (2 * labels - 1) + noise * rng.normal(size=images))))
        asked = np.arange(images) % len(signals) == place if folds else np.full(images, fill_value=True)
        shares[place, asked] = np.stack([1 - score, score], 1)[asked]
    members = tuple(Member(0, fold) for fold in range(len(signals)))
    return Answers(source, members, shares)


# --- the plan


@pytest.mark.parametrize("test", [0.0, 0.2])
def test_each_patient_is_left_out_once_a_repeat_and_on_one_side_of_each_run(test):
    images = make_images()
    plan = CrossPlan(4, 3, CONFIG_OF_ALL.model_copy(update={"test": test}))
    splits = plan.keep_out(images)
    learning, outer = take(images, splits.train), {images.records[i].group for i in splits.test}
    assert bool(outer) == bool(test)
    left_out = defaultdict(list)
    for member in plan.members:
        sides = defaultdict(set)
        for record in plan.put_on_sides(learning, member).records:
            sides[record.split].add(record.group)
        assert set(sides) == {"train", "validation", "test"}
        groups = [group for side in sides.values() for group in side]
        assert len(groups) == len(set(groups)), "a patient stands on two sides"
        assert not outer & set(groups)
        left_out[member.repeat] += sides["test"]
    everyone = {record.group for record in images.records} - outer
    for found in left_out.values():
        assert Counter(found) == Counter(everyone)


def test_repeats_deal_the_images_anew_and_the_outer_test_stays():
    images, plan = make_images(), CrossPlan(3, 2, CONFIG_OF_ALL)
    learning = take(images, plan.keep_out(images).train)
    folds = [
        {record.name for record in plan.put_on_sides(learning, Member(repeat, 0)).on_side("test").records}
        for repeat in (0, 1)
    ]
    assert folds[0] != folds[1]
    assert [plan.configure(Member(repeat, 0), "32-true").seed for repeat in (0, 1)] == [0, 1]
    assert plan.keep_out(images) == replace(plan, repeats=1).keep_out(images)


def test_what_the_source_keeps_for_test_stays_out():
    images = make_images()
    groups = sorted({record.group for record in images.records})
    side_of = {group: ("test", "validation", "train")[min(i % 5, 2)] for i, group in enumerate(groups)}
    records = tuple(replace(record, split=side_of[record.group]) for record in images.records)
    given = replace(images, records=records)
    plan = CrossPlan(3, 1, CONFIG_OF_ALL.model_copy(update={"test": 0.0}))
    splits = plan.keep_out(given)
    assert {records[i].split for i in splits.test} == {"test"}
    assert len(splits.test) == sum(record.split == "test" for record in records)
    assert len(plan.put_on_sides(take(given, splits.train), Member(0, 0))) == len(images) - len(splits.test)


def test_too_few_folds_or_patients_are_refused():
    with pytest.raises(ConfigError, match=r"needs 2 folds and 1 repeat at least\. Got 1 and 1"):
        CrossPlan(1, 1, CONFIG_OF_ALL)
    with pytest.raises(SplitError, match="too few for --folds 90"):
        CrossPlan(90, 1, CONFIG_OF_ALL).put_on_sides(take(make_images(), range(90)), Member(0, 0))


# --- figures


def test_pooled_figures_are_those_of_the_model_that_left_each_image_out():
    answers = make_answers(folds=True)
    told = judge_folds(answers, resamples=200)
    assert answers.out_of_fold.shape == (1, 60, 2)
    pooled = told["pooled"]["auc"]
    assert pooled["value"] == mean_auc(answers.out_of_fold[0], answers.labels)
    assert pooled["low"] < pooled["value"] < pooled["high"]
    folds = [mean_auc(one.probabilities, one.labels) for one in answers.scores()]
    assert told["over_folds"]["auc"]["values"] == folds
    assert told["over_folds"]["auc"]["value"] == pytest.approx(np.mean(folds))
    assert told["over_folds"]["auc"]["low"] < np.mean(folds) < told["over_folds"]["auc"]["high"]
    assert told["over_repeats"]["auc"]["values"] == [pooled["value"]]
    assert np.isnan(told["over_repeats"]["auc"]["standard_deviation"])


def test_over_repeats_the_pooled_figure_is_the_mean_and_has_a_spread():
    one, other = make_answers(folds=True), make_answers((0.4, 0.4, 0.4), folds=True)
    members = (*one.members, *(Member(1, member.fold) for member in other.members))
    both = Answers(one.images, members, np.concatenate([one.probabilities, other.probabilities]))
    told, parts = (
        judge_folds(both, resamples=200),
        [judge_folds(part, resamples=200) for part in (one, other)],
    )
    values = [part["pooled"]["auc"]["value"] for part in parts]
    assert told["over_repeats"]["auc"]["values"] == values
    assert told["over_repeats"]["auc"]["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert told["pooled"]["auc"]["value"] == pytest.approx(np.mean(values))


def test_an_image_that_was_left_out_twice_or_never_is_noticed():
    for wrong in (np.nan, 0.5):
        answers = make_answers(folds=True)
        answers.probabilities[0, 0 if wrong != wrong else 1] = wrong
        with pytest.raises(ArtifactError, match=r"left .* out [02] times, not once"):
            _ = answers.out_of_fold


# --- whether averaging helps


def test_patients_are_counted_only_where_any_is_known():
    answers = make_answers((1.0, 1.0))
    known = {"patients": len({record.group for record in answers.images.records})}
    records = tuple(replace(record, group=record.name) for record in answers.images.records)
    alone = replace(answers, images=replace(answers.images, records=records))
    assert known.items() <= judge_average(answers, resamples=50).items()
    assert "patients" not in judge_average(alone, resamples=50)


def test_the_average_of_copies_is_no_better_than_one():
    answers = make_answers((1.0,))
    copies = Answers(
        answers.images, tuple(Member(0, f) for f in range(3)), np.repeat(answers.probabilities, 3, 0)
    )
    judged = judge_average(copies, resamples=200)
    assert not judged["helped"]
    assert not judged["hurt"]
    for name in ("auc", "nll", "brier"):
        assert list(judged[name]["difference"].values()) == pytest.approx([0, 0, 0], abs=1e-12)
        assert judged[name]["ensemble"]["value"] == pytest.approx(judged[name]["single"]["value"])
    assert "that it helps is not shown" in describe_average(judged)


def test_models_that_err_apart_are_better_together_and_the_words_say_so():
    answers = make_answers((0.8,) * 8, images=60)
    judged = judge_average(answers, resamples=200)
    assert judged["helped"]
    gain = judged["auc"]["difference"]
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert gain["value"] == pytest.approx(
        judged["auc"]["ensemble"]["value"] - judged["auc"]["single"]["value"]
    )
    together = answers.score_mean()
    assert gain["value"] == paired_difference([(together, one) for one in answers.scores()]).value
    said = describe_average(judged)
    assert said.endswith(": it helped.")
    assert f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in said


def test_of_one_patient_nothing_tells_whether_averaging_helps():
    answers = make_answers((0.8,) * 8, images=60)
    records = tuple(replace(record, group="one") for record in answers.images.records)
    judged = judge_average(replace(answers, images=replace(answers.images, records=records)), resamples=50)
    assert judged["auc"]["difference"]["value"] > 0
    assert not judged["helped"]
    assert not judged["hurt"]
    said = describe_average(judged)
    assert said.endswith(": too few images or patients to tell.")
    assert "nan" not in said


def test_an_average_that_ranks_worse_is_called_harm():
    answers = make_answers((3.0,) * 3, noise=0.3)
    answers.probabilities[2] = answers.probabilities[2, :, ::-1] ** 50  # sure, and the wrong way round
    answers.probabilities[2] /= answers.probabilities[2].sum(1, keepdims=True)
    judged = judge_average(answers, resamples=200) | {"hurt": True, "helped": False}
    assert "it did harm" in describe_average(judged)


def test_nll_and_brier_of_an_average_are_never_worse():
    for seed in range(3):
        judged = judge_average(make_answers((0.3 * seed, 1.0, 2.0)), resamples=200)
        for name in ("nll", "brier"):
            assert judged[name]["difference"]["high"] <= 1e-12


def test_without_outer_images_it_says_that_it_does_not_know():
    assert judge_average(None) is None
    assert "--test 0.2 keeps some" in describe_average(None)


# --- a whole one


def test_every_fold_leaves_a_finished_run_and_is_heard_of(whole):
    runs = {path.name for path in (whole.out / "runs").iterdir()}
    assert runs == {f"r{repeat}-f{fold}" for repeat in (0, 1) for fold in range(2)}
    assert [name for name, *_ in whole.heard] == sorted(runs)
    assert [done for _, done, _, _ in whole.heard] == [1, 2, 3, 4]
    for name in runs:
        files = {path.name for path in (whole.out / "runs" / name).iterdir()}
        assert {"model.safetensors", "metrics.json", "report.html", "splits.csv"} <= files
    assert {path.name for path in whole.out.iterdir()} == {
        "runs", "plan.json", "config.yaml", "splits.csv", "out_of_fold.csv", "outer_test.csv", "cross_validation.json",
    }  # fmt: skip


def command_in(page: Path) -> list[str]:
    """Return the arguments of the command that a report has for making the run again."""
    found = re.search(
        r"<code>(chanscale .*?)</code>", page.read_text().partition("To make it again")[2], re.S
    )
    return shlex.split(html.unescape(found[1]).replace("\\\n", ""))[1:]


@pytest.mark.parametrize(("member", "repeats"), [("r0-f1", 1), ("r1-f0", 2)])
def test_the_report_of_a_fold_has_the_command_of_its_cross_validation(
    whole, data, tiny, tmp_path, capsys, member, repeats
):
    told = command_in(whole.out / "runs" / member / "report.html")
    assert told[:6] == ["cross-validate", "IMAGES", "--out", "FOLDER", "--folds=2", f"--repeats={repeats}"]
    out = tmp_path / "again"
    shutil.copytree(whole.out, out)
    named = {"IMAGES": str(data), "FOLDER": str(out)}
    assert cli.run([named.get(one, one) for one in told]) == 0  # other options would be refused
    assert f"{2 * repeats} of {2 * repeats} runs are there" in capsys.readouterr().err
    assert cli.run(["report", str(out / "runs" / member), f"--images={data}"]) == 0
    assert command_in(out / "runs" / member / "report.html") == told


def test_each_image_is_out_of_fold_once_a_repeat_and_no_patient_in_two_folds(whole, data):
    rows = read_table(whole.out / "out_of_fold.csv")
    outer = {row["image"] for row in read_table(whole.out / "outer_test.csv")}
    names = {record.name for record in open_images(data).records}
    assert Counter((row["image"], row["repeat"]) for row in rows) == Counter(
        (name, repeat) for name in names - outer for repeat in "01"
    )
    fold_of = defaultdict(set)
    for row in rows:
        fold_of[row["patient"], row["repeat"]].add(row["fold"])
    assert all(len(folds) == 1 for folds in fold_of.values())
    assert not {row["patient"] for row in rows} & {
        row["patient"] for row in read_table(whole.out / "outer_test.csv")
    }
    assert all(abs(float(r["probability_clear"]) + float(r["probability_spot"]) - 1) < 1e-6 for r in rows)


def test_no_run_has_seen_what_it_is_judged_on(whole):
    outer = {row["image"] for row in read_table(whole.out / "outer_test.csv")}
    rows = read_table(whole.out / "out_of_fold.csv")
    for member in whole.found.out_of_fold.members:
        seen = {
            row["name"] for row in read_table(whole.out / "runs" / member.name / "splits.csv") if row["split"] != "test"
        }  # fmt: skip
        judged = {
            r["image"] for r in rows if (int(r["repeat"]), int(r["fold"])) == (member.repeat, member.fold)
        }
        assert judged
        assert not seen & (judged | outer)


def test_the_figures_are_those_of_the_runs_and_of_the_table(whole):
    told = json.loads((whole.out / "cross_validation.json").read_text())
    rows = read_table(whole.out / "out_of_fold.csv")
    for member in told["members"]:
        metrics = json.loads((whole.out / member["run"] / "metrics.json").read_text())
        assert member["auc"] == metrics["auc"]["value"]
    assert told["over_folds"]["auc"]["values"] == [member["auc"] for member in told["members"]]
    for repeat, value in enumerate(told["over_repeats"]["auc"]["values"]):
        own = [row for row in rows if row["repeat"] == str(repeat)]
        shares = np.array([[float(r["probability_clear"]), float(r["probability_spot"])] for r in own])
        assert mean_auc(
            shares, np.array([row["label"] == "spot" for row in own]).astype(int)
        ) == pytest.approx(value)
    assert {"auc", "accuracy", "sensitivity", "specificity", "nll", "brier"} == told["pooled"].keys()
    assert any("Bengio" in note for note in told["notes"])
    assert told["ensemble"]["models"] == 4
    assert told["images"]["folds"] + told["images"]["test"] == 48


def test_the_folder_is_an_ensemble_that_says_what_its_figures_say(whole, data, tiny):
    model, info = load_ensemble(whole.out)
    assert len(model.members) == 4
    images = open_images(data, group_pattern="^(\\d+)_")
    kept_out = take(images, read_splits(whole.out / "splits.csv", images).test)
    decoded = load_images(kept_out, CONFIG_OF_ALL.model_copy(update={"group_pattern": None}), Watcher())
    shares, labels = predict(model, decoded, range(len(decoded)))
    assert info.classes == ("clear", "spot")
    assert shares == pytest.approx(whole.found.outer.probabilities.mean(0), abs=1e-6)
    told = json.loads((whole.out / "cross_validation.json").read_text())
    assert mean_auc(shares, labels) == pytest.approx(told["ensemble"]["auc"]["ensemble"]["value"])


# --- stopped, and gone on with


class Stopping(Watcher):
    """Interrupts the run after so many epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, *_):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def be_killed(arguments) -> None:
    """Run the command in a process that is killed when its first run is finished."""
    program = (
        "import os, signal, tiny_backbone; tiny_backbone.register()\n"
        "from chanscale import cross_validate_command\n"
        "def die(member, done, total, metrics): os.kill(os.getpid(), signal.SIGKILL)\n"
        "cross_validate_command._tell = die\n"
        "from chanscale.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, check=False, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_stopped_and_gone_on_with_is_undisturbed(whole, data, tiny, tmp_path):
    out = tmp_path / "again"
    be_killed(
        ["cross-validate", str(data), "--out", str(out), *OPTIONS, "--folds=2", "--repeats=2", "--test=0.2"]
    )
    assert {path.name for path in (out / "runs").iterdir()} == {"r0-f0"}
    (out / ".cross_validation.json.17.tmp").write_text("half")

    def go_on(epochs):
        return chanscale.cross_validate(
            "tiny", data, out=out, folds=2, repeats=2, config=CONFIG_OF_ALL, watcher=Stopping(epochs)
        )

    for epochs in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            go_on(epochs)
        assert not (out / "cross_validation.json").exists()
        assert not (out / ".lock").exists()
    go_on(1000)
    for name in ("out_of_fold.csv", "outer_test.csv", "splits.csv", "config.yaml", "plan.json"):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes()
    assert files_below(out).keys() == files_below(whole.out).keys()


# --- the command


def test_the_same_command_again_trains_nothing_and_tells_the_whole(whole, data, tiny, capsys):
    before = files_below(whole.out / "runs")
    assert run(data, whole.out, "--repeats=2", "--test=0.2") == 0
    told, err = words(capsys)
    assert "4 of 4 runs are there" in err
    flat = " ".join(told.split())
    assert all(word in flat for word in ("pooled", "sd, repeats", "sensitivity", "brier"))
    assert "The average of the 4 models, on " in flat
    assert "Bengio & Grandvalet 2004" in flat
    assert files_below(whole.out / "runs") == before


def test_what_takes_one_run_says_that_it_is_a_cross_validation(whole, data, tiny, tmp_path, capsys):
    for arguments in (
        ["explain", whole.out, data, "--out", tmp_path / "why"], ["export", whole.out], ["verify", whole.out],
        ["report", whole.out, "--images", data], ["latency", whole.out], ["leaks", data, "--run", whole.out],
    ):  # fmt: skip
        line = error_of(capsys, arguments)
        assert f"{whole.out} is a cross-validation of 4 runs, and this takes one" in line
        assert line.endswith(f"such as {whole.out / 'runs' / 'r0-f0'}")


def test_its_json_is_that_of_the_file(whole, data, tiny, capsys):
    assert run(data, whole.out, "--repeats=2", "--test=0.2", "--json") == 0
    told = json.loads(words(capsys)[0])
    assert told.pop("folder") == str(whole.out)
    assert told == json.loads((whole.out / "cross_validation.json").read_text())


def test_other_options_than_it_was_begun_with_are_one_line(whole, data, tiny, capsys):
    more = ["cross-validate", data, "--out", whole.out, *OPTIONS, "--test=0.2"]
    assert "was begun with budget=0.5, not 0.6" in error_of(capsys, [*more, "--folds=2", "--budget=0.6"])
    assert "was begun with folds=2, not 3" in error_of(capsys, [*more, "--folds=3"])


def test_an_interrupt_says_that_the_same_command_goes_on(data, tiny, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("chanscale.crossval.validation.scale_and_select", stop)
    assert run(data, tmp_path / "cv") == 130
    assert words(capsys)[1].splitlines()[-2:] == [
        "0 of 2 runs are there; the same command goes on", "interrupted; nothing half-written is left",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cross-validate"], "Missing argument 'DATA'"),
        (["cross-validate", "d"], "Missing option '--out'"),
        (["cross-validate", "nowhere", "--out", "cv"], "nowhere does not exist"),
        (["cross-validate", "d", "--out", "cv", "--folds", "1"], "Invalid value for '--folds'"),
        (["cross-validate", "d", "--out", "cv", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["cross-validate", "d", "--out", "cv", "--budget", "2"], "budget: Input should be less than 1"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_no_fold_could_run_with_leaves_nothing(data, tiny, tmp_path, capsys):
    for options, message in (
        (["--folds=20"], "too few for --folds 20"),
        (["--folds=2", f"--out={data / 'cv'}"], "lies in the images' folder"),
        (["--folds=2", "--backbone=resnet1"], "must be one of"),
        (["--folds=2", "--coverage=0.99"], "coverage=0.99 takes"),
    ):
        out = [] if any("--out" in option for option in options) else ["--out", tmp_path / "cv"]
        assert message in error_of(capsys, ["cross-validate", data, *out, *OPTIONS, *options])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(data, tiny, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    line = error_of(capsys, ["cross-validate", data, "--out", tmp_path, *OPTIONS, "--folds=2"])
    assert "holds something else than a cross-validation" in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "chanscale-cross-plan/9"}'])
def test_a_damaged_plan_is_named(data, tiny, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"plan\.json is (damaged|of another version)"):
        chanscale.cross_validate("tiny", data, out=tmp_path, folds=2, config=CONFIG_OF_ALL)


def test_an_unreadable_image_stops_it_or_is_left_out_of_all_folds(data, tiny, tmp_path, capsys):
    broken = draw(tmp_path / "data")
    (broken / "spot" / "001_0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="001_0"):
        chanscale.cross_validate("tiny", broken, out=tmp_path / "no", folds=2, config=CONFIG_OF_ALL)
    assert run(broken, tmp_path / "cv", "--skip-bad", "--test=0") == 0
    lines = [line.split(":")[0] for line in words(capsys)[1].splitlines() if " removed, " in line]
    assert [line for line in lines if "/2 " in line] == ["1/2 r0-f0", "2/2 r0-f1"]
    names = {row["image"] for row in read_table(tmp_path / "cv" / "out_of_fold.csv")}
    assert len(names) == 47
    assert not (tmp_path / "cv" / "outer_test.csv").exists()
