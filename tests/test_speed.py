"""How a run computes is found once, kept, and never left to chance: laws of the choice, whatever the clock says."""

import json
from html import unescape
from types import SimpleNamespace

import pytest
import torch

from chanscale import team
from chanscale.classifier import lay_out
from chanscale.config import TIMING, FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.errors import ArtifactError
from chanscale.pipeline import scale_and_select
from chanscale.progress import Watcher
from chanscale.report_page.card import describe_training
from chanscale.runs import RunFolder
from chanscale.speed import other_work, remembered, settling, steps
from chanscale.speed.choice import Calibration, Choice, Measurement
from chanscale.speed.other_work import OtherWork
from chanscale.speed.remembered import path_of, recall, remember
from chanscale.speed.settling import adopt, recall_speed, settle_speed
from chanscale.speed.steps import TrainingStep
from chanscale.speed.turns import MARGIN, calibrate, find_faster
from networks import same_tensors
from tiny_backbone import NAME, register
from tiny_fits import SPLITS, tiny_classifier, tiny_config, tiny_images

IMAGES = tiny_images()
START = Choice(precision="32-true", threads=8)
KNOBS = {"threads": [4, 2, 1], "channels_last": [False]}
FACTS = {"processor": "one", "threads": 8}
FOUND = Calibration(
    chosen=Choice(precision="32-true", channels_last=False, threads=1, workers=4), rate=2.0, plain=1.0
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch):
    register(monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Takes as long for a step as it is told, on a clock of its own; notes what it was asked."""

    def __init__(self, seconds):
        self.seconds, self.now, self.asked = seconds, 0.0, []

    def time(self, choice):
        self.asked.append(choice)
        taken = self.seconds(choice)
        self.now += taken
        return taken

    def calibrate(self, limit=1e6):
        return calibrate(self.time, START, KNOBS, images=5, typical=1.0, limit=limit, clock=lambda: self.now)


# --- what is chosen


def test_the_fastest_value_of_each_knob_is_chosen_and_its_gain_told():
    machine = Machine(
        lambda choice: {8: 1.0, 4: 0.9, 2: 0.4, 1: 0.8}[choice.threads] * (1 + choice.channels_last)
    )
    found = machine.calibrate()
    assert found.chosen == START.model_copy(update={"threads": 2, "channels_last": False})
    assert found.gain == pytest.approx(1.0 / 0.4)
    rates = {(one.knob, one.value): one.rate for one in found.measured}
    assert rates["threads", 8] == pytest.approx(5 / 2.0)
    assert rates["channels_last", False] == pytest.approx(5 / 0.4)


@pytest.mark.parametrize(("factor", "wins"), [(1 / MARGIN * 1.01, False), (1 / MARGIN * 0.99, True)])
def test_a_rival_within_the_margin_replaces_nothing(factor, wins):
    found = Machine(lambda choice: 1.0 if choice.channels_last else factor).calibrate()
    assert found.chosen.channels_last is not wins


def test_a_rival_that_is_faster_by_the_median_alone_replaces_nothing():
    assert find_faster({"first": [1, 1, 1, 9, 9], "rival": [2, 2, 0.5, 0.5, 0.5]}) == "first"
    assert find_faster({"first": [1, 1, 1, 9, 9], "rival": [0.5, 0.5, 0.5, 0.5, 0.5]}) == "rival"


def test_turns_go_back_and_forth():
    machine = Machine(lambda _: 1.0)
    machine.calibrate(limit=30)
    order = [choice.threads for choice in machine.asked]
    assert order[4:12] == [8, 4, 2, 1, 1, 2, 4, 8]


def test_a_rival_that_is_hopeless_or_fails_is_left_after_one_step():
    slow = {4: 13.0, 2: float("inf")}
    machine = Machine(lambda choice: slow.get(choice.threads, 1.0))
    found = machine.calibrate()
    assert [sum(one.threads == threads for one in machine.asked) for threads in slow] == [1, 1]
    assert found.chosen == START
    assert {one.value for one in found.measured if one.knob == "threads"} == {8, 1}


def test_without_the_time_for_all_turns_nothing_is_concluded():
    machine = Machine(lambda choice: 0.1 if choice.threads == 1 else 1.0)
    found = machine.calibrate(limit=3)
    assert (found.chosen, found.measured, found.gain) == (START, (), None)
    assert machine.asked == []
    assert "no time" in found.describe()


def test_trying_ends_in_about_its_time():
    machine = Machine(lambda _: 1.0)
    found = machine.calibrate(limit=40)
    assert found.measured
    assert machine.now <= 40 + len(START.model_dump()) * 7


# --- a step


def test_a_step_leaves_the_model_the_threads_and_the_random_numbers_as_they_are():
    model, config = tiny_classifier(), tiny_config()
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    step = TrainingStep(model, IMAGES, SPLITS, config)
    for layout in (True, False):
        seconds = step.time(Choice(precision="32-true", channels_last=layout, threads=1))
        assert 0 < seconds < float("inf")
    assert step.images == config.micro_batch
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_machine_cannot_compute_takes_for_ever(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(steps, "_pass", fail)
    step = TrainingStep(tiny_classifier(), IMAGES, SPLITS, tiny_config())
    assert step.time(START) == float("inf")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA reaches")
def test_a_step_on_a_gpu_is_waited_for():
    step = TrainingStep(tiny_classifier(), IMAGES, SPLITS, tiny_config(device="cuda"))
    found = [step.time(Choice(precision="bf16-mixed", channels_last=layout)) for layout in (True, False)]
    assert all(0 < seconds < 60 for seconds in found)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_layout_changes_no_value_and_is_the_same_each_time(channels_last):
    model = tiny_classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    there = {name: t.stride() for name, t in lay_out(model, channels_last=channels_last).state_dict().items()}
    back = lay_out(lay_out(model, channels_last=not channels_last), channels_last=channels_last).state_dict()
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert {name: tensor.stride() for name, tensor in back.items()} == there


# --- what is kept of it


def test_what_was_found_comes_back_from_the_cache():
    remember(FACTS, FOUND)
    assert recall(FACTS) == FOUND
    assert recall(FACTS | {"threads": 4}) is None


def damage(content, **changes):
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: json.dumps(content)[:40],
        lambda _: "[]",
        lambda _: "\0\1",
        lambda content: damage(content, format="other"),
        lambda content: damage(content, facts={}),
        lambda content: damage(content, found=None),
        lambda content: damage(content, found=content["found"] | {"chosen": {"precision": "16-true"}}),
        lambda content: damage(content, found=content["found"] | {"rate": -1}),
        lambda content: damage(content, found=content["found"] | {"more": 1}),
        lambda content: damage(content, found=content["found"] | {"rate": "fast"}),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_as_none(spoil):
    remember(FACTS, FOUND)
    path = path_of(FACTS)
    path.write_text(spoil(json.loads(path.read_text())))
    assert recall(FACTS) is None


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path / "file"))
    remember(FACTS, FOUND)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "use --speed off" in caplog.text
    assert recall(FACTS) is None


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_computes_all_the_same(caplog):
    remember(FACTS, FOUND)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "set CHANSCALE_HOME" in caplog.text
    assert recall(FACTS) is None


# --- a fit


@pytest.fixture
def trying(monkeypatch):
    """Have every fit try, and find what `found` is; counts how often."""
    noted = SimpleNamespace(found=FOUND, times=0)

    def find(*_, **__):
        noted.times += 1
        return noted.found

    monkeypatch.setattr(settling, "SHORT", 0.0)
    monkeypatch.setattr(settling, "FLEETING", 0.0)
    monkeypatch.setattr(settling, "calibrate", find)
    return noted


class Listener(Watcher):
    def __init__(self, stop_after=None):
        self.findings, self.stop_after = [], stop_after

    def on_finding(self, finding):
        self.findings.append(finding)

    def on_epoch(self, moment, row):  # noqa: ARG002
        if moment.epoch == self.stop_after:
            raise KeyboardInterrupt


def fit_tiny(out=None, watcher=None, resume=False, images=IMAGES.images, **options):
    config = tiny_config(
        **{"workers": None, "round_to": 1, "scale_epochs": 1, "refine_epochs": 1, "speed": "auto", **options}
    )
    return scale_and_select(NAME, images, config=config, out=out, watcher=watcher, resume=resume)


def settle(**options):
    watcher = Listener()
    return settle_speed(
        tiny_classifier(), IMAGES, SPLITS, tiny_config(**{"speed": "auto", **options}), watcher
    )


def test_a_short_training_stays_at_the_defaults_and_leaves_no_note(tmp_path):
    run = fit_tiny()
    assert run.metrics["speed"]["chosen"] == Choice(precision="32-true").model_dump()
    assert run.metrics["speed"]["measured"] == []
    assert "less than 60 s" in run.metrics["speed"]["reason"]
    assert not (tmp_path / "home").exists()


def test_what_was_not_tried_is_noted_where_another_time_it_might_be(monkeypatch):
    monkeypatch.setattr(settling, "FLEETING", 0.0)
    first = settle()
    monkeypatch.setattr(settling, "SHORT", 0.0)
    assert settle() == first


def test_metrics_and_report_hold_what_was_chosen_and_its_gain(trying, tmp_path):
    measured = settling.describe_turns({8: [1.0], 1: [0.5]}, "threads", 5)
    trying.found = FOUND.model_copy(update={"measured": tuple(measured)})
    listener = Listener()
    run = fit_tiny(tmp_path / "run", listener)
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["speed"]
    assert Calibration.from_dict(told) == trying.found
    assert told["gain"] == 2.0
    line = "speed: 1 thread, contiguous, fp32; 2.00 times the images a second of PyTorch's defaults (2.00 against 1.00)"
    assert listener.findings == [line]
    assert line.removeprefix("speed: ") in unescape((tmp_path / "run" / "report.html").read_text())
    rows = dict(describe_training(SimpleNamespace(metrics={**run.metrics, "speed": {"chosen": 1}})))
    assert "Speed" not in rows


def test_the_same_command_computes_alike_without_trying_again(trying):
    first = fit_tiny()
    trying.found = Calibration(chosen=Choice(precision="32-true"))
    second = fit_tiny()
    assert trying.times == 1
    assert second.metrics["speed"] == first.metrics["speed"]
    assert same_tensors(second.model, first.model)


def test_a_damaged_note_is_found_anew(trying, tmp_path):
    fit_tiny()
    (note,) = (tmp_path / "home" / "speed").iterdir()
    note.write_text("{")
    fit_tiny()
    assert trying.times == 2
    assert json.loads(note.read_text())["found"]["chosen"]["threads"] == 1


@pytest.mark.parametrize(("share", "told"), [(0.2, False), (0.6, True)])
def test_what_was_found_beside_other_work_is_kept_and_told_of(trying, monkeypatch, caplog, share, told):
    trying.found = FOUND.model_copy(
        update={"measured": (Measurement(knob="threads", value=1, rate=2.0, turns=3),)}
    )
    monkeypatch.setattr(settling, "OtherWork", lambda: SimpleNamespace(share=share))
    assert settle() == settle() == trying.found
    assert trying.times == 1
    assert ("other work took 60 %" in caplog.text) is told
    assert len(caplog.records) == told


def test_other_work_is_what_the_processors_did_beside_this_job(monkeypatch):
    read = iter([(100.0, 400.0, 10.0), (170.0, 500.0, 30.0), (170.0, 500.0, 130.0)])
    monkeypatch.setattr(other_work, "_read_times", lambda: next(read))
    work = OtherWork()
    assert work.share == pytest.approx(0.5)
    assert work.share == 0.0  # clocks that do not quite agree
    monkeypatch.undo()
    work = OtherWork()
    assert 0 <= work.share <= 1


def test_a_resumed_run_computes_as_it_was_begun(trying, tmp_path):
    """Even where another speed would be found now; contiguous weights lose channels and stay contiguous."""
    whole = fit_tiny(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_tiny(tmp_path / "run", Listener(stop_after=1))
    trying.found = Calibration(chosen=Choice(precision="bf16-mixed"))
    for note in (tmp_path / "home" / "speed").iterdir():
        note.unlink()
    resumed = fit_tiny(tmp_path / "run", resume=True)
    assert trying.times == 1
    assert resumed.metrics["speed"] == whole.metrics["speed"]
    files = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_model_is_laid_out_as_its_file_is_read(trying):
    run = fit_tiny()
    assert trying.found.chosen.channels_last is False
    kernels = [parameter for parameter in run.model.parameters() if parameter.dim() == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_threads_are_given_back_after_a_fit(trying):
    before = torch.get_num_threads()
    run = fit_tiny()
    assert run.metrics["threads"] == 1 == trying.found.chosen.threads
    assert torch.get_num_threads() == before


def test_no_more_threads_are_taken_than_there_were():
    torch.set_num_threads(2)
    adopt(Choice(precision="32-true", threads=64), tiny_config())
    assert torch.get_num_threads() == 2
    knobs = settling.list_knobs(START, FitConfig(), {"gpu": None})
    assert knobs["threads"] == [1]


def test_off_and_what_is_given_win(trying):
    assert settle(speed="off").chosen == Choice(precision="32-true", workers=0)
    assert trying.times == 0
    chosen = FOUND.chosen.model_copy(update={"precision": "32-true"})
    assert adopt(chosen, FitConfig(workers=3)).workers == 3
    assert adopt(chosen, FitConfig()).workers == chosen.workers
    bf16 = Choice(precision="bf16-mixed")
    assert "precision" not in settling.list_knobs(bf16, FitConfig(precision="bf16-mixed"), {"gpu": None})
    assert settling.list_knobs(bf16, FitConfig(), {"gpu": None})["precision"] == ["32-true"]
    assert settling.list_knobs(bf16, FitConfig(), {"gpu": "one"}) == {"channels_last": [False]}


class Slow(DecodedImages):
    """Images that are decoded anew each time."""

    cached = False


@pytest.fixture
def draws(monkeypatch):
    """Images that take a second to decode, with 8 threads there; `rate`: how many a second are trained on."""
    monkeypatch.setattr(
        settling, "Draws", lambda *_: SimpleNamespace(images=10, time=lambda workers: 10 / workers)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def choose(rate, **options):
        slow = Slow(IMAGES.images, image_size=32, channels=1)
        config = tiny_config(**{"workers": None, **options})
        found = Calibration(chosen=START, rate=rate, plain=rate)
        return settling.choose_workers(found, slow, SPLITS, config, limit=1e6)

    return choose


def test_workers_are_as_many_as_training_waits_for(draws):
    assert draws(rate=100.0).chosen.workers == 8
    assert draws(rate=0.5).chosen.workers == 2
    assert draws(rate=100.0, workers=1).chosen.workers == START.workers
    assert [one.value for one in draws(rate=100.0).measured] == [2, 4, 8]


def test_workers_of_images_in_memory_are_left_alone():
    found = Calibration(chosen=START, rate=1.0, plain=1.0)
    assert settling.choose_workers(found, IMAGES, SPLITS, tiny_config(workers=None), limit=1e6) == found


def test_a_draw_decodes_other_images_each_time():
    seen = []

    class Noting(Slow):
        def batch(self, indices):
            seen.append(list(indices))
            return super().batch(indices)

    draws = steps.Draws(Noting(IMAGES.images, image_size=32, channels=1), SPLITS, tiny_config(batch_size=4))
    for _ in range(3):
        draws.time(0)
    drawn = [index for indices in seen for index in indices]
    assert sorted(drawn) == sorted(SPLITS.train)


# --- older runs, and several processes


def test_a_run_of_an_older_version_goes_on_as_it_began():
    found = recall_speed({"precision": "bf16-mixed"}, tiny_config())
    assert found.chosen == Choice(precision="bf16-mixed", workers=0)
    with pytest.raises(ArtifactError, match="cannot resume"):
        recall_speed({"speed": {"chosen": None}}, tiny_config())


def test_an_unfinished_run_takes_other_options_of_timing_alone(tmp_path):
    config = tiny_config(backbone="tiny")
    partial = tmp_path / "run.partial"
    partial.mkdir()
    old = {name: value for name, value in config.model_dump(mode="json").items() if name != "speed"}
    (partial / "config.yaml").write_text(json.dumps(old | {"workers": 2}))
    for name in TIMING - {"cache_gib"}:
        assert config.model_copy(update={name: None}) != config
    RunFolder.open(tmp_path / "run", config.model_copy(update={"workers": None, "speed": "off"}), resume=True)


def test_all_processes_come_to_what_the_first_finds(trying, monkeypatch):
    """Also where each would find another speed, and another remembers one."""
    monkeypatch.setattr(settling, "is_main", lambda: False)
    remember({}, FOUND)
    told = iter([None, 100.0, FOUND.model_copy(update={"rate": 7.0})])
    heard = []

    def agree(value):
        heard.append(value)
        return next(told)

    monkeypatch.setattr(settling, "agree", agree)
    trying.found = Calibration(chosen=START)
    assert settle(workers=None).rate == 7.0
    assert heard[0] is None
    assert heard[2] == trying.found
    assert team.team_size() == 1
    assert remembered.recall({}) == FOUND
