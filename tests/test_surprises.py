"""What `fit` and `predict` say of images that are unlike those of training, and of images that are there twice."""

import csv
import io
import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from chanscale import FitConfig, cli, load_model, pipeline, runs, scale_and_select
from chanscale.novelty.storage import NOVELTY, find_novelty
from chanscale.pipeline import MOST_SEARCHED, note_leaks
from chanscale.predictions import UNCERTAIN, predict_images
from chanscale.progress import Watcher
from test_cli import OPTIONS, draw, error_of, words
from test_export import make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the tiny backbone, and its images."""
    yield from make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def strange(tmp_path):
    """A folder with a colourful stripe pattern, which no training image resembles."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[::2, :, 0], pixels[1::2, :, 2] = 255, 255
    (tmp_path / "strange").mkdir()
    Image.fromarray(pixels).save(tmp_path / "strange" / "stripes.png")
    return tmp_path / "strange"


def say(capsys, arguments):
    assert cli.run([str(argument) for argument in arguments]) == 0
    return words(capsys)[0]


def test_a_run_knows_its_training_images_and_how_often_it_is_wrong_about_that(made):
    run, _ = made
    told = json.loads((run / "metrics.json").read_text())["novelty"]
    assert (run / NOVELTY).is_file()
    assert told["rate"] == 0.05
    assert 0 <= told["test_flagged"] <= 1
    assert 0 <= told["test_near_ties"] <= 1
    assert find_novelty(run) is not None


def test_predict_flags_a_strange_image_and_says_why(made, strange, capsys):
    run, _ = made
    (told,) = json.loads(say(capsys, ["predict", run, strange, "--json"]))
    assert told["flagged"] is True
    assert told["novelty"] <= 0.05
    assert any("colour" in reason for reason in told["reasons"])
    assert told["predicted"] in ("clear", "spot")  # without --abstain a class is named


def test_the_table_has_the_flags_beside_the_probabilities_of_a_model_without_a_detector(
    made, strange, capsys, tmp_path
):
    run, data = made
    shutil.copytree(run, tmp_path / "bare")
    (tmp_path / "bare" / NOVELTY).unlink()
    say(capsys, ["predict", run, data, strange, "--out", tmp_path / "with.csv"])
    say(capsys, ["predict", tmp_path / "bare", data, strange, "--out", tmp_path / "without.csv"])
    told, bare = (
        list(csv.DictReader(io.StringIO((tmp_path / f"{name}.csv").read_text())))
        for name in ("with", "without")
    )
    assert len(told) == len(bare) == 49
    assert [{name: row[name] for name in bare[0]} for row in told] == bare
    assert set(told[0]) - set(bare[0]) == {"novelty", "flagged", "reasons", "near_tie"}
    flagged = [row["image"] for row in told if row["flagged"] == "yes"]
    assert str(strange / "stripes.png") in flagged
    assert len(flagged) < 10  # of 48 images like those of training


def test_abstain_names_no_class_for_it_and_keeps_the_probabilities(made, strange, capsys):
    run, data = made
    plain = json.loads(say(capsys, ["predict", run, strange, data, "--json"]))
    careful = json.loads(say(capsys, ["predict", run, strange, data, "--json", "--abstain"]))
    for before, after in zip(plain, careful, strict=True):
        unsure = before["flagged"] or before["near_tie"]
        assert after["predicted"] == (UNCERTAIN if unsure else before["predicted"])
        assert after | {"predicted": None} == before | {"predicted": None}
    assert careful[0]["predicted"] == UNCERTAIN
    assert any(item["predicted"] != UNCERTAIN for item in careful)


def test_the_table_on_the_screen_gives_the_reason(made, strange, capsys):
    run, _ = made
    out = say(capsys, ["predict", run, strange, "--abstain"])
    assert UNCERTAIN in out
    assert "colour" in out


def test_abstain_needs_a_detector(made, strange, capsys, tmp_path):
    shutil.copytree(made[0], tmp_path / "bare")
    (tmp_path / "bare" / NOVELTY).unlink()
    line = error_of(capsys, ["predict", tmp_path / "bare", strange, "--abstain"])
    assert NOVELTY in line
    assert "--abstain" in line
    assert "nor one that was restored from a delta; copy the file from the run" in line


def test_one_line_of_python_does_the_same(made, strange, capsys):
    run, _ = made
    model, info = load_model(run)
    told = predict_images(model, info, [strange], detector=find_novelty(run), abstain=True).to_dicts()
    assert told == json.loads(say(capsys, ["predict", run, strange, "--abstain", "--json"]))


def test_too_few_images_for_a_detector_are_no_error(tmp_path, made):
    data, run = draw(tmp_path / "images", patients=10), tmp_path / "run"
    assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS]) == 0
    assert not (run / NOVELTY).exists()
    assert "novelty detector needs" in json.loads((run / "metrics.json").read_text())["novelty"]["reason"]


def test_fit_warns_of_an_image_that_is_there_twice(tmp_path, made, caplog):
    data, run = draw(tmp_path / "images"), tmp_path / "run"
    for patient in range(30, 36):  # other patients, by their names
        shutil.copy(data / "clear" / "000_0.png", data / "clear" / f"{patient:03}_0.png")
    assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS]) == 0
    noted = json.loads((run / "metrics.json").read_text())["leaks"]
    assert noted["pairs"] == 21  # of seven images that are one
    assert "look like one exposure" in caplog.text
    assert "chanscale leaks" in caplog.text


def test_fit_is_silent_where_all_images_differ(tmp_path, made, caplog):
    data, run = draw(tmp_path / "images"), tmp_path / "run"
    assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS]) == 0
    assert json.loads((run / "metrics.json").read_text())["leaks"]["pairs"] == 0
    assert [record.getMessage() for record in caplog.records if record.name.startswith("chanscale")] == []


class Many(list):
    """Stands for so many decoded pictures."""

    space = None

    def __init__(self, count):
        super().__init__(range(count))


def test_twins_are_not_sought_unasked_among_very_many_images(monkeypatch):
    monkeypatch.setattr(pipeline, "leaks_of_fit", lambda images, *_, **__: ({"pairs": len(images)}, None))
    assert MOST_SEARCHED <= 5_000
    assert note_leaks(Many(MOST_SEARCHED), None, Watcher()) == {"pairs": MOST_SEARCHED}
    assert note_leaks(Many(MOST_SEARCHED + 1), None, Watcher()) is None


@pytest.mark.parametrize("failing", ["fit_novelty", "save_novelty"])
def test_a_failure_of_the_detector_keeps_the_run(made, tmp_path, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise ValueError("Input contains\nNaN")

    monkeypatch.setattr(runs, failing, fail)
    data, run = made[1], tmp_path / "run"
    assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS]) == 0
    assert load_model(run)[1].classes == ("clear", "spot")
    assert not (run / NOVELTY).exists()
    assert json.loads((run / "metrics.json").read_text())["novelty"] == {
        "reason": "ValueError: Input contains NaN"
    }
    assert f"no {NOVELTY} was written (ValueError: Input contains NaN)" in caplog.text


def test_the_detector_tells_how_far_it_is(tmp_path, made):
    class Listener(Watcher):
        steps: ClassVar[list] = []

        def on_step(self, what, done, total):
            self.steps.append((what, done, total))

    config = FitConfig(
        backbone="tiny", image_size=32, budget=0.5, round_to=1, scale_epochs=1, refine_epochs=0,
        precision="32-true", batch_size=8, micro_batch=8, workers=0, group_pattern=r"^(\d+)_",
    )  # fmt: skip
    scale_and_select("tiny", made[1], config=config, out=tmp_path / "run", watcher=Listener())
    heard = [
        (done, total) for what, done, total in Listener.steps if what == "learning which images are usual"
    ]
    assert heard
    assert all(0 < done <= total for done, total in heard)
