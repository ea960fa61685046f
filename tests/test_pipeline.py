"""What `scale_and_select` leaves behind when it cannot go on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chanscale.artifact import load_model
from chanscale.errors import ArtifactError, BudgetError, ConfigError, DataError, ModelError, SplitError
from chanscale.evaluation import evaluate
from chanscale.pipeline import scale_and_select
from chanscale.progress import Watcher
from chanscale.runs import RunFolder
from networks import build_classifier
from tiny_fits import SPLITS, tiny_classifier, tiny_config, tiny_images

IMAGES = tiny_images()


def test_an_error_of_training_leaves_nothing_half_written(tmp_path):
    with pytest.raises(BudgetError, match="Lower the budget"):
        scale_and_select(
            tiny_classifier().trunk, IMAGES.images, config=tiny_config(budget=0.9999), out=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_whole_run_of_a_trunk_of_the_users_own_stands_in_its_place(tmp_path):
    run = scale_and_select(tiny_classifier().trunk, IMAGES.images, config=tiny_config(), out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert run.metrics["parameters"]["removed"] >= 0.7
    assert np.isfinite(run.metrics["auc"]["value"])


def test_images_of_other_classes_are_not_judged():
    with pytest.raises(DataError, match="the images have the classes no, yes, the model left, right"):
        evaluate(build_classifier(classes=("left", "right")), IMAGES)


class StoppedError(Exception):
    pass


class StopAfter(Watcher):
    """Stops the run when it has finished an epoch."""

    def on_epoch(self, moment, row):  # noqa: ARG002
        raise StoppedError


def fit_tiny(out, images=IMAGES.images, **options):
    return scale_and_select(tiny_classifier().trunk, images, config=tiny_config(), out=out, **options)


def with_another_image(images):
    extra = replace(images.records[0], name="new.png", group="new")
    return replace(images, records=(*images.records, extra))


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    """Its split would be another: images it was trained on would become test images."""
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path / "run", watcher=StopAfter())
    before = (tmp_path / "run.partial" / "splits.csv").read_text()
    with pytest.raises(SplitError):
        fit_tiny(tmp_path / "run", with_another_image(IMAGES.images), resume=True)
    assert (tmp_path / "run.partial" / "splits.csv").read_text() == before


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path / "run", watcher=StopAfter())
    (tmp_path / "run.partial" / ".checkpoint.safetensors.99.tmp").write_bytes(b"half")
    resumed, whole = fit_tiny(tmp_path / "run", resume=True), fit_tiny(tmp_path / "whole")
    assert resumed.metrics["auc"] == whole.metrics["auc"]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert not [name for name in names if name.startswith(".")]


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path):
    config = tiny_config()
    other = RunFolder(tmp_path / "run", config)
    other.begin(IMAGES.images, SPLITS)
    with pytest.raises(ArtifactError, match="another process works in"):
        fit_tiny(tmp_path / "run", resume=True)
    assert (tmp_path / "run.partial" / "config.yaml").exists()
    other.release()


class Dictionary(nn.Module):
    """A trunk as segmentation libraries have them: it returns more than the feature map."""

    def __init__(self):
        super().__init__()
        self.layers = tiny_classifier().trunk

    def forward(self, x):
        return {"out": self.layers(x)}


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        (Dictionary(), "must return a feature map"),
        (nn.Sequential(*tiny_classifier().trunk, nn.MaxPool2d(64)), "does not run on images of"),
    ],
    ids=["dictionary", "too small"],
)
def test_a_trunk_that_makes_no_feature_map_is_an_error_before_anything_is_written(tmp_path, trunk, words):
    with pytest.raises(ModelError, match=words):
        scale_and_select(trunk, IMAGES.images, config=tiny_config(), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"positive": "no"}, {"group_pattern": "x"}])
def test_options_of_a_path_are_refused_with_an_image_set(option):
    with pytest.raises(ConfigError, match="say how to open a path"):
        scale_and_select(tiny_classifier().trunk, IMAGES.images, config=tiny_config(**option))


def test_the_users_trunk_keeps_its_mode():
    trunk = tiny_classifier().trunk.eval()
    trunk[3].train()
    scale_and_select(trunk, IMAGES.images, config=tiny_config())
    assert [module.training for module in trunk] == [index == 3 for index in range(len(trunk))]


def test_a_model_of_the_users_own_network_asks_for_it(tmp_path):
    run = fit_tiny(tmp_path / "run")
    with pytest.raises(ArtifactError, match="pass that network as `trunk`"):
        load_model(tmp_path / "run")
    loaded, _ = load_model(tmp_path / "run", trunk=tiny_classifier().trunk)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), run.model.parameters(), strict=True))


def test_the_gradient_penalty_removes_on_the_way():
    config = tiny_config(penalty="gradient", scale_epochs=8, refine_epochs=0, round_to=1, threshold=0.3)
    history = scale_and_select(tiny_classifier().trunk, IMAGES.images, config=config).history
    left = [row["parameters"] for row in history]
    assert left[-2] < left[0]
    assert max(row["removal_change"] or 0 for row in history) > 0
