"""The images of a run, opened again: with the patients and the sides that the run knew."""

import json
from dataclasses import replace

import pytest

from chanscale import FitConfig, scale_and_select
from chanscale.artifact import load_model, model_path
from chanscale.crossval.plan import FORMAT
from chanscale.data.sources import open_images
from chanscale.data.splits import read_test_names, read_training_names, split_images
from chanscale.errors import SplitError
from chanscale.own_images import open_own_images
from test_cli import draw
from tiny_backbone import register

CONFIG = FitConfig(
    image_size=32, budget=0.5, round_to=1, scale_epochs=1, refine_epochs=1, precision="32-true", batch_size=8,
    micro_batch=8, workers=0,
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was given an `ImageSet` with patients, which no option of its tells; and the folder of the images."""
    register(monkeypatch.setitem, monkeypatch.setattr)
    data = draw(tmp_path / "images")
    images = open_images(data, group_pattern=r"^(\d+)_")
    return scale_and_select("tiny", images, config=CONFIG, out=tmp_path / "runs" / "one").folder, data


def open_again(run, data):
    _, info = load_model(run)
    return open_own_images(data, model_path(run), info)


def test_the_patients_are_those_that_the_run_knew(run):
    folder, data = run
    assert FitConfig.read(folder / "config.yaml").group_pattern is None
    images, splits = open_again(folder, data)
    assert images.has_groups
    groups = [images.records[index].group for index in splits.test]
    assert len(set(groups)) == len(groups) / 2  # two images of each


def test_a_fold_does_without_the_images_that_its_cross_validation_kept_out(run):
    folder, data = run
    extra = data / "spot" / "999_0.png"
    extra.write_bytes((data / "spot" / "001_0.png").read_bytes())
    with pytest.raises(SplitError, match="999_0"):
        open_again(folder, data)
    outer = folder.parent.parent / "splits.csv"
    rows = (folder / "splits.csv").read_text().replace(",test\n", ",train\n")
    outer.write_text(rows + "spot/999_0.png,spot,999,test\n")
    with pytest.raises(SplitError, match="999_0"):  # a table by that name, but no plan: it may be of anything
        open_again(folder, data)
    outer.with_name("plan.json").write_text(json.dumps({"format": FORMAT}))
    images, splits = open_again(folder, data)
    assert "spot/999_0.png" not in {record.name for record in images.records}
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 48


def test_what_was_skipped_when_the_run_was_made_is_skipped_again(tmp_path, monkeypatch):
    register(monkeypatch.setitem, monkeypatch.setattr)
    data = draw(tmp_path / "images")
    files = sorted(path.relative_to(data) for path in data.glob("*/*.png"))
    rows = [f"{path},{path.parent}" for path in files]
    table = data / "table.csv"
    table.write_text("\n".join(["path,label", *rows, "spot/not_there.png,spot"]))
    (data / files[3]).write_bytes(b"no image")
    config = CONFIG.model_copy(update={"skip_bad": True})
    folder = scale_and_select("tiny", table, config=config, out=tmp_path / "run").folder
    images, splits = open_again(folder, table)
    assert len(images) == len(files) - 1 == len(splits.side_of)


def test_the_same_set_gives_the_same_split(run):
    folder, data = run
    images, splits = open_again(folder, data)
    first = open_images(data, group_pattern=r"^(\d+)_")
    assert splits == split_images(first, validation=CONFIG.validation, test=CONFIG.test, seed=CONFIG.seed)
    assert replace(images, skipped=()) == first


def test_of_several_frames_those_alone_are_left_out_that_are_outer_test(tmp_path):
    table = tmp_path / "splits.csv"
    rows = "a.dcm#1,x,p,train\na.dcm#2,x,p,train\nb.dcm#1,x,q,test\nb.dcm#2,x,q,test\n"
    table.write_text("name,label,group,split\n" + rows)
    assert read_test_names(table) == {"b.dcm#1", "b.dcm#2"}
    assert read_training_names(table) == {"a.dcm"}
