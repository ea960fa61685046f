"""A run whose probabilities are calibrated, with an operating point and prediction sets: every way to it agrees."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_backbone
from chanscale import cli, explain_run
from chanscale.artifact import load_model, read_model, write_tensors
from chanscale.commands import _show_run as show_run
from chanscale.data.loading import DecodedImages, decode_images
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, read_splits
from chanscale.decision_rules import DecisionRules, settle_rules, temper
from chanscale.delta import Restorer, save_delta
from chanscale.display import describe_evaluation, describe_predictions
from chanscale.errors import ArtifactError, ConfigError
from chanscale.evaluation import Evaluation, evaluate, predict_logits
from chanscale.metrics import mean_auc
from chanscale.operating_point import OperatingPoint
from chanscale.pipeline import Run, scale_and_select
from chanscale.predictions import Predictions, predict_images
from chanscale.progress import Watcher
from chanscale.report import describe_run
from chanscale.report_page import material, mistakes
from chanscale.report_page.writing import build_report
from networks import same_tensors
from test_report import printed
from tiny_fits import tiny_config
from tiny_reports import draw, few_draws

EQUAL = 1e-6  # of probabilities that come from logits divided before, and after, one rounding to fp32
SIDES = {"validation": 0.35, "test": 0.25}


@dataclass(frozen=True)
class Fitted:
    run: Run
    plain: Run
    """The same without any rule."""
    images: DecodedImages
    splits: Splits


def fit(folder, images: ImageSet, **rules) -> Iterator[Fitted]:
    """Fit one run twice, with and without rules; the backbone stays registered until the generator is closed."""
    with pytest.MonkeyPatch.context() as patch, few_draws():
        tiny_backbone.register(patch.setitem, patch.setattr)
        runs = [
            scale_and_select("tiny", images, config=tiny_config(**SIDES, **options), out=folder / name)
            for name, options in (("run", rules), ("plain", {"calibrate": False}))
        ]
        splits = read_splits(folder / "run" / "splits.csv", images)
        yield Fitted(*runs, decode_images(images, image_size=32, workers=0), splits)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    images = blur(draw(patients=80))
    yield from fit(tmp_path_factory.mktemp("two"), images, sensitivity=0.8, coverage=0.8)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    images = blur(draw(("a", "b", "c"), patients=80))
    yield from fit(tmp_path_factory.mktemp("three"), images, coverage=0.6)


def blur(images: ImageSet) -> ImageSet:
    """Return the images with a class that is wrong for every seventh, so that no model is right about all."""
    records = [
        replace(record, label=(record.label + (place % 7 == 0)) % len(images.classes))
        for place, record in enumerate(images.records)
    ]
    return ImageSet(images.source, images.classes, tuple(records))


def logits_of(run, fitted, side):
    return predict_logits(run.model, fitted.images, getattr(fitted.splits, side))


@pytest.fixture(params=["two", "three"])
def fitted(request):
    return request.getfixturevalue(request.param)


# --- the model


def test_a_calibrated_model_divides_logits_and_is_otherwise_the_same(fitted):
    temperature = fitted.run.metrics["calibration"]["temperature"]
    assert temperature != 1
    for side in ("validation", "test"):
        got, labels = logits_of(fitted.run, fitted, side)
        wanted, _ = logits_of(fitted.plain, fitted, side)
        np.testing.assert_allclose(got, wanted / temperature, atol=EQUAL * np.abs(wanted).max(), rtol=EQUAL)
        before, after = temper(wanted, 1), temper(got, 1)
        assert (before.argmax(1) == after.argmax(1)).all()
        if len(fitted.run.info.classes) == 2:
            assert mean_auc(before, labels) == mean_auc(after, labels)
    trunk, plain = (run.model.trunk.state_dict() for run in (fitted.run, fitted.plain))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in trunk.items())


def test_the_nll_of_validation_falls_as_metrics_say(fitted):
    told = fitted.run.metrics["calibration"]
    logits, labels = logits_of(fitted.plain, fitted, "validation")
    assert told["images"] == len(labels)
    for name, temperature in (("nll_before", 1), ("nll_after", told["temperature"])):
        shares = temper(logits, temperature)[np.arange(len(labels)), labels]
        assert told[name] == pytest.approx(-np.log(shares.astype(float)).mean(), abs=1e-5)
    assert told["nll_after"] < told["nll_before"]


def test_the_figures_before_are_those_of_the_run_that_was_not_calibrated(fitted):
    told, plain = fitted.run.metrics["calibration"], fitted.plain.metrics["calibration"]
    assert plain["temperature"] == 1
    assert plain["reason"] == "it was not asked for"
    for name in ("nll", "ece", "brier"):
        assert told["before"][name]["value"] == pytest.approx(plain["after"][name]["value"], abs=1e-5)
        assert told["after"][name]["low"] < told["after"][name]["high"]
    assert fitted.run.metrics["accuracy"] == fitted.plain.metrics["accuracy"]


def test_reloaded_equals_saved_bit_for_bit_rules_included(fitted):
    model, info = load_model(fitted.run.folder)
    assert same_tensors(model, fitted.run.model)
    assert info == fitted.run.info
    assert info.prediction_sets is not None


def test_a_delta_gives_the_file_back_byte_for_byte(two, tmp_path):
    delta = save_delta(two.run.folder, tmp_path / "delta.safetensors")
    assert Restorer().rebuild(delta) == (two.run.folder / "model.safetensors").read_bytes()
    assert Restorer().restore(delta)[1].operating_point == two.run.info.operating_point


def test_a_file_without_rules_loads_and_one_with_damaged_rules_does_not(two, tmp_path):
    tensors, metadata = read_model(two.run.folder / "model.safetensors")
    older = {k: v for k, v in metadata["info"].items() if k not in ("operating_point", "prediction_sets")}
    path = write_tensors(tmp_path / "model.safetensors", tensors, metadata | {"info": older})
    assert load_model(path)[1].operating_point is None
    for rule, change, said in (
        ("operating_point", {"threshold": 2}, r"operating_point\.threshold"),
        ("operating_point", {"sensitivity": 1}, r"operating_point\.sensitivity"),
        ("prediction_sets", {"coverage": 0}, r"prediction_sets\.coverage"),
        ("prediction_sets", {"least": [0.1, 0.2, 0.3]}, "the prediction sets are of other classes"),
    ):
        damaged = metadata["info"] | {rule: metadata["info"][rule] | change}
        write_tensors(path, tensors, metadata | {"info": damaged})
        with pytest.raises(ArtifactError, match=said):
            load_model(path)
    three = metadata["info"] | {"classes": ["a", "b", "c"], "prediction_sets": None}
    write_tensors(path, tensors, metadata | {"info": three})
    with pytest.raises(ArtifactError, match="an operating point is for two classes"):
        load_model(path)


def test_the_exported_graph_gives_the_calibrated_probabilities(two):
    pytest.importorskip("onnxruntime", reason="needs: pip install 'chanscale[export]'")
    from chanscale.export.agreement import raw_pixels
    from chanscale.export.onnx_file import export_onnx
    from chanscale.export.runtime import open_session, run_session

    model, info = load_model(two.run.folder)
    chosen = two.splits.test[:4]
    stored = [two.images.images.records[index].pixels for index in chosen]
    content, _ = export_onnx(model, info, [pixels[None].astype(np.uint16) * 257 for pixels in stored])
    run = run_session(open_session(content))
    got = np.concatenate([run(raw_pixels(pixels[None].astype(np.uint16) * 257)) for pixels in stored])
    wanted, _ = predict_logits(two.run.model, two.images, chosen)
    np.testing.assert_allclose(got, temper(wanted, 1), atol=1e-5)
    assert not np.allclose(got, temper(predict_logits(two.plain.model, two.images, chosen)[0], 1), atol=1e-3)


# --- the rules


def test_validation_reaches_what_was_asked_for(two):
    judged = evaluate(two.run.model, two.images, two.splits.validation)
    point, sets = two.run.info.operating_point, two.run.info.prediction_sets
    assert point.metrics()["sensitivity"](judged.probabilities, judged.labels) >= 0.8
    for k in range(2):
        assert sets.metrics()[f"coverage_{k}"](judged.probabilities, judged.labels) >= 0.8


def test_metrics_tell_what_the_rules_come_to_on_test_images(two):
    judged = evaluate(two.run.model, two.images, two.splits.test)
    point, sets = two.run.info.operating_point, two.run.info.prediction_sets
    written = json.loads((two.run.folder / "metrics.json").read_text())
    for told, rule in ((written["operating_point"], point), (written["prediction_sets"], sets)):
        for name, metric in rule.metrics().items():
            value = metric(judged.probabilities, judged.labels)
            assert told[name]["value"] == pytest.approx(value)
            assert told[name]["low"] <= value <= told[name]["high"]
    assert written["operating_point"]["threshold"] == point.threshold
    assert written["operating_point"]["rests_on"] == point.rests_on


def test_without_test_images_the_rules_have_no_figures():
    told = DecisionRules().judge(None)
    assert told == {"calibration": told["calibration"]}
    assert "after" not in told["calibration"]


def test_with_no_rule_asked_for_the_model_is_the_same_object(two):
    config = tiny_config(calibrate=False)
    model, rules = settle_rules(two.plain.model, two.images, two.splits, config)
    assert model is two.plain.model
    assert rules == DecisionRules()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sensitivity": 0.9}, "sensitivity is for two classes"),
        ({"coverage": 0.99}, "takes 99 validation images"),
    ],
)
def test_what_validation_cannot_support_is_an_error_before_training(three, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        scale_and_select(
            "tiny", three.images.images, config=tiny_config(**SIDES, **options), out=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


# --- what is shown


def predictions_of(fitted, side="test"):
    indices = getattr(fitted.splits, side)[:12]
    logits, _ = predict_logits(fitted.run.model, fitted.images, indices)
    names, info = tuple(f"{index}.png" for index in indices), fitted.run.info
    return Predictions(names, info.classes, temper(logits, 1), (), info.operating_point, info.prediction_sets)


def test_a_prediction_says_what_is_called_positive_and_what_is_not_ruled_out(two):
    found, threshold = predictions_of(two), two.run.info.operating_point.threshold
    held = two.run.info.prediction_sets.contain(found.probabilities)
    for row, shares, classes in zip(found.to_dicts(), found.probabilities, held, strict=True):
        assert row["called_positive"] is bool(shares[1] >= threshold)
        assert row["predicted"] == ("yes" if shares[1] > shares[0] else "no")
        assert row["prediction_set"] == [
            name for name, is_in in zip(("no", "yes"), classes, strict=True) if is_in
        ]
    table = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert list(table[0])[4:] == ["called_positive", "in_set_no", "in_set_yes"]
    assert [row["called_positive"] == "yes" for row in table] == found.called_positive
    assert [[name for name in ("no", "yes") if row[f"in_set_{name}"] == "yes"] for row in table] == found.sets
    assert "not ruled out" in printed(describe_predictions(found.to_dicts()), 120)


def test_a_prediction_of_several_classes_has_sets_and_no_threshold(three):
    row = predictions_of(three).to_dicts()[0]
    assert list(row) == ["image", "predicted", "probabilities", "prediction_set"]


def test_evaluate_judges_by_the_rules(two, tmp_path, capsys):
    for index in two.splits.test:
        record = two.images.images.records[index]
        path = tmp_path / "new" / two.run.info.classes[record.label] / record.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.pixels).save(path)
    assert cli.run(["evaluate", str(two.run.folder), str(tmp_path / "new"), "--json"]) == 0
    told, written = json.loads(capsys.readouterr().out), two.run.metrics
    for rule, names in (
        ("operating_point", ("sensitivity", "specificity", "ppv", "npv")),
        ("prediction_sets", ("coverage", "size", "coverage_0", "coverage_1")),
    ):
        for name in names:
            assert told[rule][name]["value"] == pytest.approx(written[rule][name]["value"])
    table = printed(describe_evaluation(told))
    assert f"npv at {told['operating_point']['threshold']:.3f}" in table
    assert "classes in a set" in table


def test_the_table_of_a_fit_has_two_lines_more(two):
    rich, plain = (printed(describe_run(run.metrics)) for run in (two.run, two.plain))
    told = two.run.metrics
    assert len(rich.splitlines()) == len(plain.splitlines()) + 2
    assert f"Temperature {told['calibration']['temperature']:.2f}: calibration error" in rich
    assert f"At {told['operating_point']['threshold']:.3f}: sensitivity" in rich


def test_the_report_starts_at_the_operating_point_and_shows_both_calibrations(two):
    page, point = (two.run.folder / "report.html").read_text(), two.run.info.operating_point
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page).group(1))
    judged = evaluate(two.run.model, two.images, two.splits.test)
    called = point.call(judged.probabilities)
    assert data["start"]["threshold"] == point.threshold
    assert data["start"]["true_positives"] == (called & (judged.labels == 1)).sum()
    assert f'<output id="threshold-shown" for="threshold">{point.threshold:.3f}</output>' in page
    assert f'<output id="fp">{(called & (judged.labels == 0)).sum()}</output>' in page
    told = two.run.metrics["calibration"]
    row = re.search(r'<tr data-calibration="ece">(.*?)</tr>', page).group(1)
    assert re.findall(r'value="([^"]+)"', row) == [
        str(told[side]["ece"]["value"]) for side in ("before", "after")
    ]
    assert "What it cannot rule out" in page
    plain = (two.plain.folder / "report.html").read_text()
    assert "What it cannot rule out" not in plain
    assert "Before calibration" not in plain


def test_the_report_counts_the_mistakes_that_its_matrix_shows(two):
    page, point = (two.run.folder / "report.html").read_text(), two.run.info.operating_point
    judged = evaluate(two.run.model, two.images, two.splits.test)
    wrong = int((point.call(judged.probabilities) != (judged.labels == 1)).sum())
    shown = {name: int(re.search(f'<output id="{name}">([0-9]+)<', page).group(1)) for name in ("fp", "fn")}
    assert shown["fp"] + shown["fn"] == wrong
    assert f"{wrong} were called wrongly at the threshold of {point.threshold:.3f}." in page


@pytest.mark.parametrize("threshold", [0.02, 0.98])
def test_a_mistake_is_one_at_the_operating_point(threshold):
    shares = np.array([[0.9, 0.1], [0.1, 0.9]] * 2, np.float32)
    labels = np.array([0, 0, 1, 1])
    judged = Evaluation(tuple("abcd"), np.arange(4).astype(str), labels, shares[:, 1:], shares, {})
    point = OperatingPoint(threshold, 0.9, 20, 3)
    called = [int(threshold < 0.5)] * 4  # all of them, or none
    found = mistakes._worst(judged, point)
    assert {one.place for one in found} == set(np.flatnonzero(called != labels).tolist())
    assert all(one.probability == shares[one.place, one.called] for one in found)
    assert mistakes.count_mistakes(judged, point) == mistakes.count_mistakes(judged, None) == 2
    assert {one.place for one in mistakes._worst(judged, None)} == {1, 2}


def test_explain_says_of_an_image_what_predict_says_of_it(two, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for record in two.images.images.records[:12]:
        Image.fromarray(record.pixels).save(folder / record.name)
    predicted = predict_images(two.run.model, two.run.info, [folder]).to_dicts()
    assert cli.run(["explain", str(two.run.folder), str(folder), "--out", str(tmp_path / "why")]) == 0
    shown = capsys.readouterr().out.split()
    assert {"positive", "ruled", "yes", "no"} <= set(shown)
    index = json.loads((tmp_path / "why" / "index.json").read_text())
    for name in ("predicted", "called_positive", "prediction_set"):
        assert [entry[name] for entry in index["images"]] == [row[name] for row in predicted]
    assert len({row["called_positive"] for row in predicted}) == 2


def test_explain_says_nothing_of_rules_that_a_run_has_not(two, tmp_path):
    record = two.images.images.records[0]
    Image.fromarray(record.pixels).save(tmp_path / record.name)
    [entry] = explain_run(two.plain.folder, tmp_path / record.name, out=tmp_path / "why").index["images"]
    assert not {"called_positive", "prediction_set"} & entry.keys()


def test_a_run_of_an_older_version_has_a_report(two, tmp_path, monkeypatch):
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("model.safetensors", "splits.csv", "history.csv"):
        (folder / name).write_bytes((two.plain.folder / name).read_bytes())
    metrics = json.loads((two.plain.folder / "metrics.json").read_text())
    metrics.pop("calibration")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = (two.plain.folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"(calibrate|sensitivity|coverage):.*\n", "", config))
    monkeypatch.setattr(material, "open_own_images", lambda *_: (two.images.images, two.splits))
    opened = material.open_material(folder, tmp_path, watcher=Watcher())
    assert opened.config.calibrate is False
    page = build_report(opened)
    assert "Calibration error" in page
    assert "Before calibration" not in page


@pytest.mark.parametrize(("rests_on", "lines"), [(2, 1), (9, 0)])
def test_a_threshold_that_rests_on_few_images_is_told_on_the_command_line(two, capsys, rests_on, lines):
    point = {"doubt": OperatingPoint(0.3, 0.8, 40, rests_on).doubt}
    show_run(replace(two.run, metrics=two.run.metrics | {"operating_point": point}), as_json=True)
    assert capsys.readouterr().err.count("warning: with 40 positive validation images") == lines
