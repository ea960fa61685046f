"""What `scale_and_select` leaves behind when it cannot go on."""

import numpy as np
import pytest

from chanscale.errors import BudgetError, DataError
from chanscale.evaluation import evaluate
from chanscale.pipeline import scale_and_select
from networks import build_classifier
from tiny_fits import tiny_classifier, tiny_config, tiny_images

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
