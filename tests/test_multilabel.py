"""Several labels an image: each is a question of its own, and what is unknown counts for nothing."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from chanscale import cli, export_run, load_model
from chanscale.calibration import CALIBRATION, judge_calibration
from chanscale.classifier import class_weights, classification_loss, probabilities
from chanscale.data import open_images
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.loading import decode_images
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.splits import read_splits, split_images, write_splits
from chanscale.errors import DataError, SplitError
from chanscale.evaluation import evaluate
from chanscale.explain_command import _describe_shares
from chanscale.leaks.findings import contradict
from chanscale.metrics import accuracy, area_under_roc, as_pairs, estimate, label_auc, mean_auc, resample
from chanscale.novelty.storage import find_novelty
from chanscale.probe import fit_head, regress
from chanscale.temperature import find_temperature
from networks import build_classifier, plain_trunk, randomise, same_tensors
from test_cli import OPTIONS, error_of, words
from tiny_backbone import register

CLASSES = ("left", "right", "rare|odd")


def draw(folder, patients=40):
    """Write two images of each patient, and a table: a bright half is a label, some labels are unknown."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True)
    rows = []
    for patient in range(patients):
        labels = [patient % 2, patient // 2 % 2, int(patient % 5 == 0)]
        for film in range(2):
            pixels = rng.integers(0, 120, (32, 32), dtype=np.uint8)
            pixels[:, :16] += np.uint8(90 * labels[0])
            pixels[:, 16:] += np.uint8(90 * labels[1])
            pixels[12:20] //= np.uint8(1 + 3 * labels[2])
            name = f"{patient:03}_{film}.png"
            Image.fromarray(pixels).save(folder / name)
            told = ["" if rng.random() < 0.1 else str(label) for label in labels]
            rows.append([name, *told])
    return write(folder / "table.csv", ["path", *CLASSES], rows)


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def drawn(count=60, labels=3, seed=0):
    """Return logits (N, K) and labels (N, K), of which some are unknown."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2, (count, labels))
    logits = (rng.normal(size=(count, labels)) + found).astype(np.float32)
    found[rng.random(found.shape) < 0.2] = UNKNOWN
    return logits, found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the tiny backbone on images of three labels, and their table."""
    folder = tmp_path_factory.mktemp("labels")
    table, run = draw(folder / "images"), folder / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch.setitem, monkeypatch.setattr)
        assert cli.run(["fit", str(table), "--out", str(run), *OPTIONS]) == 0
        yield run, table


# --- the images


def test_each_column_but_ours_is_a_label_in_their_order(tmp_path):
    rows = [
        ["a.png", "1", "0", "p1", "1.0"],
        ["b.png", "", "-1", "p1", "0"],
        ["c.png", "0", "nan", "p2", ""],
    ] * 2
    rows = [[f"{number}{row[0]}", *row[1:]] for number, row in enumerate(rows)]
    for row in rows:
        Image.new("L", (8, 8)).save(tmp_path / row[0])
    table = write(tmp_path / "t.csv", ["Path", "Mass", "effusion", "GROUP", "Oedema"], rows)
    with pytest.raises(DataError, match=r"class '(without )?effusion'"):
        open_images(table)
    images = open_images(table, label_columns=("Oedema", "Mass"))
    assert images.classes == ("Oedema", "Mass")
    assert images.is_multilabel
    assert images.labels.tolist() == [[1, 1], [0, -1], [-1, 0]] * 2
    assert images.counts == {"Oedema": 2, "Mass": 2}
    assert [record.group for record in images.records[:3]] == ["p1", "p1", "p2"]


@pytest.mark.parametrize(
    ("columns", "row", "options", "said"),
    [
        (
            ["path", "a"],
            ["x.png", "yes"],
            {},
            "line 2: wanted 1, 0, or nothing (unknown) for the label 'a', got 'yes'",
        ),
        (["path", "a"], ["x.png", "2"], {}, "got '2'"),
        (
            ["path", "klass"],
            ["x.png", "mass"],
            {},
            "call the column `label` if it holds the class of each image, or",
        ),
        (["path", "group"], ["x.png", "1"], {}, "a column for each of several labels"),
        (["path", "a", "b"], ["x.png", "1", "0"], {"label_columns": ("a", "c")}, "has no column 'c'"),
        (["path", "a", "a"], ["x.png", "1", "0"], {}, "has the label 'a' twice"),
        (["path", "a"], ["x.png", "1"], {}, "only the class 'a'"),
        (["path", "a", "b"], ["x.png", "1", "0"], {"classes": ("a",)}, "has the class 'b'"),
    ],
)
def test_a_table_of_labels_that_cannot_be_read_says_why(tmp_path, columns, row, options, said):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(DataError) as error:
        open_images(write(tmp_path / "t.csv", columns, [row]), **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([(1, 0), (), ()], "brings images of one label and of several together (2 and 1); keep one kind"),
        ([(1, 0), (1, 0, 1), (0, 1)], "1.png of here has 3 labels; wanted one for each of 2 classes"),
    ],
)
def test_images_of_different_kinds_are_no_set(labels, said):
    pixels = np.zeros((4, 4), np.uint8)
    records = tuple(
        ImageRecord(f"{i}.png", 0, str(i), pixels=pixels, labels=own) for i, own in enumerate(labels)
    )
    images = ImageSet(Path("here"), ("a", "b"), records)
    for use in (lambda: images.labels, lambda: images.counts, lambda: decode_images(images, image_size=4)):
        with pytest.raises(DataError) as error:
            use()
        assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [None, ("0", "1")])
def test_a_table_that_brings_both_kinds_is_refused_also_where_the_classes_are_given(tmp_path, classes):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    labels = np.array([[0, 1], [1, 0]] * 2, np.uint8)
    np.savez(tmp_path / "b.npz", train_images=np.zeros((4, 4, 4), np.uint8), train_labels=labels)
    table = write(tmp_path / "t.csv", ["path", "label"], [["a.png", "0"], ["b.npz", ""]])
    with pytest.raises(DataError, match=r"of several together \(1 and 4\); keep one kind"):
        open_images(table, classes=classes)


def test_whether_a_set_is_multilabel_or_of_volumes_is_found_out_once():
    class Counted(tuple):
        looks = 0

        def __iter__(self):
            Counted.looks += 1
            return super().__iter__()

    pixels = np.zeros((4, 4), np.uint8)
    records = Counted(ImageRecord(f"{i}.png", i % 2, str(i), pixels=pixels) for i in range(4))
    images = ImageSet(Path("here"), ("a", "b"), records)
    for _ in range(3):
        assert not images.is_multilabel
        assert images.dimensions == 2
    assert Counted.looks == 2


def test_an_archive_of_label_vectors_has_several_labels(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]] * 2, np.uint8)
    path = tmp_path / "a.npz"
    np.savez(path, train_images=np.zeros((8, 4, 4), np.uint8), train_labels=labels)
    images = open_images(path)
    assert images.classes == ("0", "1", "2")
    assert np.array_equal(images.labels, labels)


def test_one_label_and_several_do_not_mix(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=np.eye(4, 2, dtype=int))
    np.savez(tmp_path / "b.npz", train_images=pixels, train_labels=np.array([0, 0, 1, 1]))
    table = write(tmp_path / "t.csv", ["path", "label"], [["a.npz", ""], ["b.npz", ""]])
    with pytest.raises(DataError, match="one label and of several together"):
        open_images(table)


def test_every_label_is_there_and_absent_on_every_side_and_comes_back(tmp_path):
    images = open_images(draw(tmp_path / "images"), group_pattern=r"^(\d+)_")
    splits = split_images(images, validation=0.2, test=0.3, seed=0)
    for side in (splits.train, splits.validation, splits.test):
        own = images.labels[list(side)]
        assert ((own == 1).any(0) & (own == 0).any(0)).all()
    write_splits(tmp_path / "splits.csv", images, splits)
    assert read_splits(tmp_path / "splits.csv", images) == splits
    other = open_images(images.source, group_pattern=r"^(\d+)_", classes=("right", "left", "rare|odd"))
    with pytest.raises(SplitError, match="make a new split"):
        read_splits(tmp_path / "splits.csv", other)


# --- the laws


def test_what_is_unknown_adds_nothing_to_the_loss_and_gives_no_gradient():
    logits, labels = (torch.from_numpy(values) for values in drawn())
    logits.requires_grad_()
    loss = classification_loss(logits, labels)
    known = labels != UNKNOWN
    every = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none")
    assert torch.allclose(loss, (every * known).sum(1) / 3)
    loss.sum().backward()
    assert torch.equal(logits.grad != 0, known)


def test_balanced_the_absence_of_a_label_weighs_as_much_as_its_presence():
    logits, labels = drawn(count=200)
    labels[:, 0] = np.where(labels[:, 0] == 1, np.arange(200) % 4 == 0, labels[:, 0])
    weights = class_weights(labels, 3)
    for label, own in enumerate(labels.T):
        there, absent = ((own == value).sum() * float(weights[label, value]) for value in (1, 0))
        assert there == pytest.approx(absent)
        assert there + absent == pytest.approx((own != UNKNOWN).sum())
    logits, labels = torch.from_numpy(logits), torch.from_numpy(labels)
    alone = [
        (F.binary_cross_entropy_with_logits(logits[i, k], labels[i, k].float()) * weights[k, labels[i, k]])
        for i in range(5) for k in range(3) if labels[i, k] != UNKNOWN
    ]  # fmt: skip
    assert float(classification_loss(logits, labels, weights)[:5].sum()) == pytest.approx(
        float(sum(alone)) / 3
    )


def test_no_figure_depends_on_what_is_said_where_the_label_is_unknown():
    logits, labels = drawn()
    other = np.where(labels == UNKNOWN, -logits, logits)
    for metric in (mean_auc, accuracy, *CALIBRATION.values()):
        one, same = (metric(1 / (1 + np.exp(-values)), labels) for values in (logits, other))
        assert one == same
        assert np.isfinite(one)
    assert find_temperature(logits, labels) == find_temperature(other, labels)


def test_where_no_label_is_known_no_figure_is_defined_and_draws_of_such_images_are_left_out():
    logits, labels = drawn(count=30)
    shares = probabilities(torch.from_numpy(logits), multilabel=True).numpy()
    nothing = np.full_like(labels, UNKNOWN)
    assert all(np.isnan(metric(shares, nothing)) for metric in (mean_auc, accuracy, *CALIBRATION.values()))
    nothing[:4] = np.abs(labels[:4])
    found = judge_calibration(shares, nothing, np.arange(30))
    assert all(np.isfinite([one.low, one.value, one.high]).all() for one in found.values())


def test_a_near_tie_is_a_label_that_is_about_as_probable_as_not(made):
    run, table = made
    detector, (model, info) = find_novelty(run), load_model(run)
    images = decode_images(open_images(table, classes=info.classes), image_size=32)
    judged = detector.judge(model, images)
    near = np.abs(judged.probabilities - 0.5).min(1) < detector.margin
    assert [verdict.near_tie for verdict in judged.verdicts] == near.tolist()
    assert 0 < near.sum() < len(near)


def test_a_single_image_has_its_label_vector(made):
    _, table = made
    images = decode_images(open_images(table), image_size=32)
    _, labels, index = images[3]
    assert labels.tolist() == list(images.images.records[index].labels)


def test_the_auc_is_the_mean_of_those_of_the_labels_that_have_one():
    logits, labels = drawn()
    aucs = [
        area_under_roc(logits[known, k], labels[known, k] == 1)
        for k, known in enumerate((labels != UNKNOWN).T)
    ]
    assert mean_auc(logits, labels) == pytest.approx(np.mean(aucs))
    labels[:, 1] = np.where(labels[:, 1] == 1, 0, labels[:, 1])
    assert np.isnan(label_auc(logits, labels, 1))
    assert mean_auc(logits, labels) == pytest.approx(np.mean([aucs[0], aucs[2]]))


def test_a_draw_that_lacks_a_rare_label_is_no_draw_of_the_mean_auc():
    """It would be the mean of fewer labels, and the interval would hold what the figure cannot be."""
    rng = np.random.default_rng(3)
    labels = np.stack([np.arange(60) < 2, rng.random(60) < 0.5, np.full(60, UNKNOWN)], 1).astype(int)
    labels[:, 2] = UNKNOWN  # decided by nothing: no label of the mean
    shares = rng.random(labels.shape)
    shares[:, 0] = labels[:, 0]  # told apart exactly
    groups, figures = np.arange(60), {"auc": mean_auc}
    found = estimate(figures, shares, labels, groups)["auc"]
    draws = list(resample(groups, 2000, np.random.default_rng(0)))
    whole = [mean_auc(shares[d], labels[d]) for d in draws if labels[d, 0].sum() > 0]
    assert len(whole) < len(draws)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(whole, [0.025, 0.975])))
    assert found.value == mean_auc(shares, labels)


def test_several_labels_are_as_many_questions_of_two_answers():
    logits, labels = drawn()
    shares = probabilities(torch.from_numpy(logits), multilabel=True).numpy()
    pairs, answers = as_pairs(shares, labels)
    assert len(answers) == (labels != UNKNOWN).sum()
    assert np.allclose(pairs.sum(1), 1)
    for metric in CALIBRATION.values():
        assert metric(shares, labels) == metric(pairs, answers)
    known = labels != UNKNOWN
    found = find_temperature(logits, labels)
    alike = find_temperature(logits[known][:, None], labels[known])
    assert (found.value, found.nll_after) == (alike.value, alike.nll_after)


def test_images_are_counted_for_the_temperature_and_not_their_labels():
    logits, labels = drawn()
    labels[:5], labels[5:, 0], labels[5:, 2] = UNKNOWN, 1, 0
    assert find_temperature(logits, labels).images == len(labels) - 5
    few = find_temperature(
        logits[:24], labels[:24]
    )  # 19 images of which something is known, and more answers
    assert (few.value, few.reason) == (1, "20 validation images are needed, and there are 19")


def test_a_head_reads_each_label_from_the_images_where_it_is_known():
    features = torch.randn(60, 16)
    labels = torch.from_numpy(drawn()[1])
    model = build_classifier(randomise(plain_trunk((8, 16, 16))), classes=CLASSES, multilabel=True)
    assert model.head.linear.out_features == 3
    fit_head(model, features, labels)
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    for label, known in enumerate((labels != UNKNOWN).numpy().T):
        alone = regress(standard[known], labels[known, label].numpy())
        assert np.allclose(model.head.linear.weight[label].detach(), alone.coef_[0], atol=1e-4)


# --- the whole way


def test_a_run_tells_every_label_and_agrees_with_itself_reloaded(made):
    run, table = made
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["labels"]) == list(CLASSES)
    assert all(0 < told["positives"] < told["known"] <= metrics["n"] for told in metrics["labels"].values())
    assert metrics["auc"]["value"] == pytest.approx(
        np.mean([t["auc"]["value"] for t in metrics["labels"].values()])
    )
    assert metrics["labels"]["left"]["auc"]["value"] > 0.9
    model, info = load_model(run)
    again, _ = load_model(run)
    assert info.multilabel
    assert same_tensors(model, again)
    images = open_images(table, group_pattern=r"^(\d+)_", classes=info.classes)
    splits = read_splits(run / "splits.csv", images)
    judged = evaluate(model, decode_images(images, image_size=32), splits.test)
    assert judged.estimates["auc"].value == pytest.approx(metrics["auc"]["value"], abs=1e-6)
    assert judged.describe_labels()["right"]["positives"] == metrics["labels"]["right"]["positives"]


def test_leaks_takes_the_columns_that_are_labels(made, tmp_path, capsys):
    _, table = made
    with table.open(newline="") as file:
        rows = [[row["path"], 40, *(row[name] for name in CLASSES)] for row in csv.DictReader(file)]
    more = write(table.with_name("more.csv"), ["path", "age", *CLASSES], rows)
    assert "--label-columns" in error_of(capsys, ["leaks", str(more)])
    assert cli.run(["leaks", str(more), "--label-columns", ", ".join(CLASSES)]) in (0, 1)


def test_two_labels_contradict_each_other_where_both_are_known():
    def record(*labels):
        return ImageRecord("a.png", label=0, group="a", labels=labels)

    assert not contradict(record(1, UNKNOWN), record(UNKNOWN, 0))
    assert not contradict(record(1, 0), record(1, UNKNOWN))
    assert contradict(record(1, 0), record(0, UNKNOWN))


def test_predict_names_the_labels_that_are_more_probable_than_not(made, capsys):
    run, table = made
    names = [str(table.parent / name) for name in ("000_0.png", "001_0.png", "003_0.png")]
    assert cli.run(["predict", str(run), *names, "--json"]) == 0
    rows = json.loads(words(capsys)[0])
    for row in rows:
        wanted = [name for name, share in row["probabilities"].items() if share > 0.5]
        assert row["predicted"] == ("|".join(wanted) or "none")
    assert any(sum(row["probabilities"].values()) > 1.2 for row in rows)


def test_evaluate_tells_the_labels_of_a_table_whose_columns_stand_in_another_order(made, capsys, tmp_path):
    run, table = made
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["extra", "right", "rare|odd", "path", "left"]
    shuffled = write(
        table.with_name("other.csv"), columns, [[row.get(name, "note") for name in columns] for row in rows]
    )
    assert cli.run(["evaluate", str(run), str(shuffled), "--json"]) == 0
    one = json.loads(words(capsys)[0])
    assert cli.run(["evaluate", str(run), str(table), "--json"]) == 0
    assert json.loads(words(capsys)[0]) == one
    assert cli.run(["evaluate", str(run), str(table)]) == 0
    assert "auc of rare|odd" in words(capsys)[0]


def test_the_report_shows_each_label(made):
    run, _ = made
    page = (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert '<table class="plain" id="labels">' in page
    assert all(f'<th scope="row">{name}</th>' in page for name in CLASSES)
    assert f"{metrics['labels']['left']['auc']['value']:.3f}" in page
    assert "says of an image which of 3 labels hold" in page
    assert "Confusion matrix</h3>" not in page


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_exports_say_what_the_run_says_label_by_label(made, tmp_path, form):
    run, table = made
    exported = export_run(run, form, out=tmp_path / "model", images=table)
    assert exported.agreement.difference < 1e-4


def test_the_table_of_explain_gives_each_label_its_share_and_of_none_the_nearest():
    def shown(*shares):
        told = dict(zip(CLASSES, shares, strict=True))
        return _describe_shares(SimpleNamespace(shares=told, multilabel=True))

    assert shown(0.9, 0.2, 0.6) == f"{CLASSES[0]} 90.0 %, {CLASSES[2]} 60.0 %"
    assert shown(0.1, 0.3, 0.2) == f"at most 30.0 % ({CLASSES[1]})"


def test_explain_takes_a_label_apart(made, tmp_path, capsys):
    run, table = made
    out = tmp_path / "why"
    assert (
        cli.run(
            ["explain", str(run), str(table.parent / "001_0.png"), "--out", str(out), "--images", str(table)]
        )
        == 0
    )
    [told] = [json.loads(path.read_text()) for path in out.glob("*001_0*.json")]
    wanted = [name for name, share in told["probabilities"].items() if share > 0.5]
    assert told["predicted"] == ("|".join(wanted) or "none")
    assert told["explained"].startswith("the log-odds of ")
    assert told["bias"] + sum(part["contribution"] for part in told["channels"]) + (
        told["rest"]["contribution"]
    ) == pytest.approx(told["logit"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "{table}", "--out", "{out}", *OPTIONS, "--sensitivity=0.9"], "`sensitivity` is for images of one"),
        (["fit", "{table}", "--out", "{out}", *OPTIONS, "--coverage=0.9"], "`coverage` is for images of one"),
        (["fit", "{table}", "--out", "{out}", *OPTIONS, "--positive=left"], "`positive` is for images of one"),
        (["fit", "{table}", "--out", "{out}", *OPTIONS, "--label-columns=left,up"], "has no column 'up'"),
        (["compare", "{table}", "--out", "{out}", "--methods=head", *OPTIONS], "comparisons and cross-validations"),
        (["cross-validate", "{table}", "--out", "{out}", "--folds=2", *OPTIONS], "comparisons and cross-validations"),
        (["stability", "{run}", "{run}/model.safetensors", "--images", "{table}"], "wanted two runs or more"),
    ],
)  # fmt: skip
def test_what_several_labels_do_not_have_is_one_line(made, tmp_path, capsys, arguments, said):
    run, table = made
    places = {"table": table, "out": tmp_path / "out", "run": run}
    assert said in error_of(capsys, [argument.format(**places) for argument in arguments])
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_class_each_is_not_judged_by_several_labels(made, tmp_path, capsys):
    run, _ = made
    folder = tmp_path / "images"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (32, 32)).save(folder / name / f"{index}.png")
    assert "several labels each" in error_of(capsys, ["evaluate", run, folder])
