"""Where the trunk ends: what decides it, and that a run of a shorter trunk is as whole as any other."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chanscale import depth as depth_module
from chanscale.artifact import load_model
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages, decode_images
from chanscale.data.splits import Splits
from chanscale.depth import (
    END,
    PRICE,
    ROOM,
    WHOLE,
    Depth,
    choose_depth,
    cross_validate,
    end_trunk,
    worth,
)
from chanscale.errors import ArtifactError, BudgetError, ConfigError
from chanscale.pipeline import scale_and_select
from chanscale.progress import Watcher
from networks import build_classifier, require_slices, same_tensors
from tiny_fits import SPLITS, tiny_classifier, tiny_config, tiny_images

IMAGES = tiny_images()
EXAMPLE = IMAGES.batch(SPLITS.train[:2])[0]


def choose(model=None, *, images: DecodedImages = IMAGES, splits: Splits = SPLITS, **options) -> Depth:
    config = tiny_config(**{"depth": "auto", "budget": 0.99, **options})
    return choose_depth(model or tiny_classifier(), images, splits, config, Watcher())


def with_constant_end(classifier):
    """Let the last convolution return the same for every image."""
    last = classifier.trunk[6]
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    return classifier


def with_pixels_changed(images: DecodedImages, indices) -> DecodedImages:
    changed = set(indices)
    records = [
        replace(record, pixels=255 - record.pixels) if index in changed else record
        for index, record in enumerate(images.images.records)
    ]
    return decode_images(replace(images.images, records=tuple(records)), image_size=32, workers=0)


class NoWatcher(Watcher):
    """Fails when a depth is looked for."""

    def on_step(self, what, *_):
        assert "layer" not in what
        assert "depth" not in what


def test_the_trunk_ends_before_layers_that_lose_the_classes():
    found = choose(with_constant_end(tiny_classifier()))
    assert found.layer == max(("2", "5"), key=found.aucs.__getitem__)
    assert found.aucs[END] == 0.5
    assert list(found.aucs) == ["2", "5", END]


def test_the_best_place_wins_and_the_first_of_equals(monkeypatch):
    for aucs, layer in (([0.6, 0.8, 0.7], "5"), ([0.8, 0.7, 0.8], "2"), ([0.6, 0.7, 0.8], None)):
        figures = iter(aucs)
        monkeypatch.setattr(depth_module, "cross_validate", lambda *_, figures=figures, **__: next(figures))
        found = choose()
        assert found.layer == layer
        assert list(found.aucs.values()) == aucs


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize(
    ("budget", "aucs"), [(0.99, [0.7, 0.72, 0.75]), (0.99, [0.6, 0.72, 0.75]), (0.999, [0.7, 0.9, 0.7])]
)
def test_a_place_counts_for_less_where_the_budget_leaves_too_little_of_what_lies_in_front(
    monkeypatch, of, budget, aucs
):
    given = iter(aucs)
    monkeypatch.setattr(depth_module, "cross_validate", lambda *_, **__: next(given))
    cost = trunk_cost(tiny_classifier(), (), EXAMPLE)
    times = [replace(cost, layers=cost.layers[:n]).of(of) / ((1 - budget) * cost.of(of)) for n in (1, 2, 3)]
    found = choose(budget=budget, budget_of=of)
    assert list(found.aucs.values()) == aucs
    assert list(found.times.values()) == pytest.approx(times, abs=0.01)
    values = [worth(auc, more) for auc, more in zip(aucs, times, strict=True)]
    assert found.layer == ("2", "5", None)[int(np.argmax(values))]


def test_with_the_same_reading_the_place_with_less_in_front_is_taken_where_little_may_stay(monkeypatch):
    monkeypatch.setattr(depth_module, "cross_validate", lambda *_, **__: next(given))
    for budget, layer in ((0.9, None), (0.99, "2")):  # at 0.9, the first layer is not offered
        given = iter([0.7, 0.72] if budget == 0.9 else [0.7, 0.7, 0.72])
        assert choose(budget=budget).layer == layer


def test_what_room_there_is_costs_nothing_and_each_doubling_beyond_the_same():
    assert worth(0.9, 1.0) == worth(0.9, ROOM) == 0.9
    assert worth(0.9, 4 * ROOM) == pytest.approx(0.9 - 2 * PRICE)


def test_a_depth_that_was_noted_before_places_were_measured_is_read():
    assert Depth.from_dict({"layer": "2", "without": ["3"], "aucs": {"2": 0.7}}).times == {}


def test_only_training_images_decide():
    others = with_pixels_changed(IMAGES, SPLITS.validation)
    assert choose(images=others) == choose()
    assert choose(images=with_pixels_changed(IMAGES, SPLITS.train[:12])) != choose()


def test_a_place_that_leaves_no_more_than_the_budget_is_not_tried():
    cost = trunk_cost(tiny_classifier(), (), EXAMPLE)
    first, second = (sum(_parameters(layer) for layer in cost.layers[:count]) for count in (1, 2))
    whole = cost.parameters()
    assert list(choose(budget=1 - (first + 1) / whole).aucs) == ["5", END]
    assert choose(budget=1 - second / whole) == WHOLE


def _parameters(layer) -> int:
    return layer.outputs * (layer.inputs * layer.taps + layer.bias)


def test_of_many_images_some_are_read(monkeypatch):
    monkeypatch.setattr(depth_module, "READ", 8)
    monkeypatch.setattr(depth_module, "RARE", 0)
    read = {0, 6, 12, 18, 1, 7, 13, 19}
    unread = [index for index in SPLITS.train if index not in read]
    assert choose(images=with_pixels_changed(IMAGES, unread)) == choose()
    monkeypatch.setattr(depth_module, "RARE", 12)
    assert choose(images=with_pixels_changed(IMAGES, unread)) != choose()


def test_features_that_are_not_finite_are_no_place_to_end():
    broken = tiny_classifier()
    nn.init.constant_(broken.trunk[3].bias, torch.inf)
    found = choose(broken)
    assert found.layer == "2"
    assert list(found.aucs) == ["2"]


def test_a_layer_is_called_by_the_name_that_the_error_lists():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = tiny_classifier().trunk

        def forward(self, x):
            return self.trunk(x)

    classifier = build_classifier(Nested())
    assert (
        choose(classifier, depth="trunk.5").layer
        == choose(classifier, depth="trunk.trunk.5").layer
        == "trunk.5"
    )


def test_a_depth_can_be_asked_for_and_one_that_cannot_be_is_told():
    assert choose(depth="full") == WHOLE
    assert choose(depth="5") == choose(depth="trunk.5") == Depth("5", ("6", "7", "8"), {})
    with pytest.raises(ConfigError, match=r"\(2, 5\).*depth='3'"):
        choose(depth="3")
    with pytest.raises(
        BudgetError, match=r"behind 5 has no more left than the budget leaves; .* \(there is none\)"
    ):
        choose(depth="5", budget=0.1)


def test_a_class_of_one_patient_cannot_be_cross_validated():
    groups = ["one" if record.label else record.group for record in IMAGES.images.records]
    records = [replace(r, group=g) for r, g in zip(IMAGES.images.records, groups, strict=True)]
    images = decode_images(replace(IMAGES.images, records=tuple(records)), image_size=32, workers=0)
    assert choose(images=images) == WHOLE


def test_patients_are_not_recognised():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    labels = torch.from_numpy(np.repeat(rng.permutation(np.arange(40) % 2), 5))
    features = torch.from_numpy(np.eye(40)[patients] + rng.normal(0, 0.01, (200, 40)))  # tells who, not what
    assert cross_validate(features, labels, patients, classes=2, seed=0) < 0.65
    assert cross_validate(features, labels, np.arange(200), classes=2, seed=0) > 0.95


def test_features_that_tell_the_classes_apart_are_seen():
    labels = torch.arange(40) % 3
    features = torch.nn.functional.one_hot(labels, 3).float()
    assert cross_validate(features, labels, np.arange(40), classes=3, seed=0) == 1
    assert cross_validate(torch.zeros(40, 5), labels, np.arange(40), classes=3, seed=0) == 0.5


def test_a_shorter_network_counts_what_was_left_out():
    whole = tiny_classifier()
    shorter = end_trunk(whole, Depth("2", ("3", "4", "5", "6", "7", "8"), {}), EXAMPLE)
    before, after = trunk_cost(whole, (), EXAMPLE), trunk_cost(shorter, (), EXAMPLE)
    assert after.original("parameters") == before.parameters() > after.parameters()
    assert after.original("macs") == before.macs() > after.macs()
    assert after.layers == before.layers[:1]
    assert shorter.head.linear.in_features == 8
    assert end_trunk(whole, WHOLE, EXAMPLE) is whole


def fit_shorter(tmp_path, watcher=None, **options):
    config = tiny_config(**{"depth": "5", "budget": 0.8, **options})
    return scale_and_select(
        tiny_classifier().trunk, IMAGES.images, config=config, out=tmp_path / "run", watcher=watcher,
        resume=(tmp_path / "run.partial").exists(),
    )  # fmt: skip


def test_a_run_removes_the_budget_counted_from_the_whole_trunk(tmp_path):
    run = fit_shorter(tmp_path)
    figures, whole = run.metrics, trunk_cost(tiny_classifier(), (), EXAMPLE)
    assert figures["parameters"]["trunk"] == whole.parameters()
    assert figures["macs"]["trunk"] == whole.macs()
    assert figures["parameters"]["removed"] >= 0.8
    assert figures["parameters"]["kept"] == sum(
        parameter.numel() for parameter in run.model.trunk.parameters() if parameter.dim() in (1, 4)
    ) - sum(len(kept) for kept in run.info.kept.values())  # the scales
    assert run.history[0]["parameters_removed"] > 0.3
    assert figures["depth"] == json.loads((tmp_path / "run" / "depth.json").read_text())


def test_a_run_of_a_shorter_trunk_is_a_slice_of_the_checkpoint_and_reloads(tmp_path):
    run = fit_shorter(tmp_path)
    original = end_trunk(tiny_classifier(), Depth("5", ("6", "7", "8"), {}), EXAMPLE)
    kept = {name: torch.tensor(indices) for name, indices in run.info.kept.items()}
    assert set(kept) == {"trunk.0", "trunk.3"}
    require_slices(run.model, original, kept)
    loaded, info = load_model(tmp_path / "run", trunk=tiny_classifier().trunk)
    assert info.without == ("6", "7", "8")
    assert same_tensors(loaded, run.model)
    with torch.no_grad():
        assert torch.equal(loaded(EXAMPLE), run.model(EXAMPLE))


class StoppedError(Exception):
    pass


class StopsAfter(Watcher):
    def on_epoch(self, moment, _):
        if moment.epoch == 1:
            raise StoppedError


def test_a_resumed_run_ends_where_the_interrupted_one_did_without_looking_again(tmp_path):
    with pytest.raises(StoppedError):
        fit_shorter(tmp_path, StopsAfter(), depth="auto")
    resumed = fit_shorter(tmp_path, NoWatcher(), depth="auto")
    (tmp_path / "other").mkdir()
    assert same_tensors(resumed.model, fit_shorter(tmp_path / "other", depth="auto").model)


def test_a_damaged_note_of_the_depth_is_told(tmp_path):
    with pytest.raises(StoppedError):
        fit_shorter(tmp_path, StopsAfter())
    (tmp_path / "run.partial" / "depth.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"depth\.json.*fit again"):
        fit_shorter(tmp_path)


def test_the_default_is_to_look():
    assert FitConfig().depth == "auto"


def test_a_colour_network_ends_early_too():
    images = tiny_images(channels=3)
    shorter = end_trunk(
        build_classifier(), Depth("2", ("3", "4", "5", "6", "7", "8"), {}), images.batch([0])[0]
    )
    assert shorter(images.batch([0, 1])[0]).shape == (2, 1)
