"""report.html: what it says is what the run says, and nothing in it comes from, or goes, elsewhere."""

import base64
import hashlib
import io
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import tiny_backbone
from chanscale import cli, runs
from chanscale.artifact import load_model
from chanscale.config import FitConfig
from chanscale.data.sources import ImageSet
from chanscale.errors import ArtifactError, DataError
from chanscale.export.examples import spread
from chanscale.pipeline import scale_and_select
from chanscale.programs import Program
from chanscale.progress import Watcher
from chanscale.report_page import channel_map, curves, mistakes, writing
from chanscale.report_page.card import write_command
from chanscale.report_page.material import WANTED, Material, open_material, read_metrics
from chanscale.report_page.writing import REPORT, build_report, embed, write_report
from chanscale.wording import NOTICE
from tiny_fits import tiny_classifier, tiny_config
from tiny_reports import EVIL, draw, few_draws

VOID = {"meta", "link", "img", "input", "br"}
LARGEST = 5_000_000


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    with few_draws():
        yield


@dataclass
class Tag:
    name: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """A page taken apart: its tags with their text; it fails on tags that are not closed in order."""

    html: str
    tags: list[Tag] = field(default_factory=list)
    open: list[Tag] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = Tag(tag, {name: value or "" for name, value in attrs})
        self.tags.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(Tag(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data):
        for tag in self.open:
            tag.text += data

    def all(self, name: str, **wanted: str) -> list[Tag]:
        """Return the tags of a name whose attributes, given with `_` for `-`, are these."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        return [tag for tag in self.tags if tag.name == name and wanted.items() <= tag.attributes.items()]

    def one(self, name: str, **wanted: str) -> Tag:
        [tag] = self.all(name, **wanted)
        return tag

    @property
    def text(self) -> str:
        return " ".join(self.one("body").text.split())


@dataclass
class Fitted:
    folder: Path
    material: Material
    page: Page
    metrics: dict

    @property
    def html(self) -> str:
        return self.page.html


def fit(out: Path, images: ImageSet, *, model="tiny", **options) -> Fitted:
    """Fit a run whose material is kept, and read the page that was written with it."""
    kept = []

    def keep(material, path, **rest):
        kept.append(material)
        return write_report(material, path, **rest)

    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        patch.setattr(runs, "write_report", keep)
        scale_and_select(model, images, config=tiny_config(**options), out=out)
    metrics = json.loads((out / "metrics.json").read_text())
    return Fitted(out, kept[0], Page((out / REPORT).read_text(encoding="utf-8")), metrics)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Fitted:
    return fit(tmp_path_factory.mktemp("page") / "run", draw())


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Fitted:
    images = draw(EVIL, name='{patient} "it\'s" <img src=x onerror=alert(2)></script>{film}.png')
    return fit(tmp_path_factory.mktemp("evil") / "run", images)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Fitted:
    return fit(tmp_path_factory.mktemp("three") / "run", draw(("red", "green", "blue"), patients=30))


@pytest.fixture(scope="module")
def untested(tmp_path_factory) -> Fitted:
    return fit(tmp_path_factory.mktemp("untested") / "run", draw(), test=0)


# --- what it says


def test_finishing_a_fit_writes_the_page(fitted):
    assert (fitted.folder / REPORT).is_file()
    assert not (fitted.folder.parent / "run.partial").exists()


def test_figures_are_those_of_the_metrics_file(fitted):
    def shown(name):
        row = fitted.html.partition(f'<tr data-figure="{name}">')[2].partition("</tr>")[0]
        return [float(value) for value in re.findall(r'<data value="([^"]+)">', row)]

    metrics = fitted.metrics
    for name in ("auc", "accuracy", "sensitivity", "specificity"):
        assert shown(name) == [metrics["before"][name]["value"], metrics[name]["value"]]
    for name in ("parameters", "macs"):
        assert shown(name) == [metrics[name]["trunk"], metrics[name]["kept"]]
    assert shown("bytes") == [metrics["bytes"]["trunk"], metrics["bytes"]["model"]]


def test_the_best_epoch_is_counted_as_on_the_console_from_1(fitted):
    best, epochs = fitted.metrics["best_epoch"], fitted.metrics["epochs"]
    assert f"{epochs}, of which epoch {best + 1} was best on validation images" in fitted.page.text
    titles = [tag.text.partition(":")[0] for tag in fitted.page.all("title")]
    assert {f"epoch {number}" for number in range(1, epochs + 1)} == {
        t for t in titles if t.startswith("epoch")
    }


def test_intervals_stand_beside_the_figures(fitted):
    row = fitted.page.one("tr", data_figure="auc").text
    for figure in (fitted.metrics["before"]["auc"], fitted.metrics["auc"]):
        assert f"{figure['value']:.3f} {figure['low']:.2f} to {figure['high']:.2f}" in row


def test_the_area_under_the_curve_is_the_auc_of_the_metrics(fitted):
    area = float(fitted.page.one("data", id="roc-area").attributes["value"])
    assert area == pytest.approx(fitted.metrics["auc"]["value"], abs=1e-12)


def test_the_confusion_at_one_half_gives_the_figures_of_the_metrics(fitted):
    tp, fn, fp, tn = (int(fitted.page.one("output", id=name).text) for name in ("tp", "fn", "fp", "tn"))
    assert tp + fn + fp + tn == fitted.metrics["n"]
    assert tp / (tp + fn) == pytest.approx(fitted.metrics["sensitivity"]["value"])
    assert tn / (tn + fp) == pytest.approx(fitted.metrics["specificity"]["value"])
    assert (tp + tn) / fitted.metrics["n"] == pytest.approx(fitted.metrics["accuracy"]["value"])


def test_the_summary_counts_images_and_patients(fitted):
    said = next(tag for tag in fitted.page.all("p") if tag.attributes.get("class") == "lead").text
    metrics = fitted.metrics
    assert f"On {metrics['n']} test images of {metrics['patients']} patients" in said
    assert f"trained on {metrics['images']['train']} images" in said
    assert f"{metrics['auc']['value']:.3f} (95\xa0% interval {metrics['auc']['low']:.2f}" in said
    assert f"{100 * metrics['parameters']['removed']:.1f}\xa0% of the network's parameters" in said


def test_the_page_says_first_what_it_is_not(fitted):
    order = [tag.attributes["id"] for tag in fitted.page.all("h2")]
    assert order[:3] == ["purpose", "summary", "figures"]
    assert fitted.page.text.index(NOTICE) < fitted.page.text.index("In short")


def test_there_is_a_cell_for_each_kept_channel_and_each_removed_one(fitted):
    kept = sum(fitted.material.info.widths.values())
    cells = [tag for tag in fitted.page.all("rect") if tag.attributes.get("class", "").startswith("kept ")]
    gone = [tag.attributes["d"].count("M") for tag in fitted.page.all("path", class_="gone")]
    assert len(cells) == kept
    assert sum(gone) == sum(tiny_backbone.WIDTHS.values()) - kept > 0


def test_the_map_is_that_of_the_indices_and_scales_of_the_model(fitted):
    material = fitted.material
    layers = channel_map.map_channels(material.model, material.info, material.widths)
    assert [[cell.index for cell in layer.kept] for layer in layers] == list(material.info.kept.values())
    for layer in layers:
        sizes = [cell.scale for cell in layer.kept]
        assert max(zip(sizes, layer.kept, strict=True), key=lambda pair: pair[0])[1].level == 5
        assert all(cell.level == min(5, 1 + int(5 * cell.scale / max(sizes))) for cell in layer.kept)


def test_layers_behind_the_end_are_marked(tmp_path):
    run = fit(tmp_path / "run", draw(), depth="features.5", budget=0.8)
    assert run.metrics["depth"]["layer"] == "features.5"
    [out] = run.page.all("path", class_="out")
    assert out.attributes["d"].count("M") == 16
    assert "features.6 left out, 16 channels" in run.page.text
    assert "the last 1 of 3 layers" in run.page.text


def test_where_the_network_ends_stands_beside_what_lies_in_front_of_each_place(fitted):
    aucs, times = {"features.2": 0.8125, "the end": 0.75}, {"features.2": 3.14, "the end": 12.5}
    depth = {"layer": "features.2", "without": [], "aucs": aucs, "times": times}
    metrics = dict(fitted.material.metrics)
    page = Page(build_report(replace(fitted.material, metrics=metrics | {"depth": depth})))
    assert "times what the budget leaves features.2 0.812 3.1 the end 0.750 12.5" in page.text
    depth.pop("times")  # as older runs have it
    page = Page(build_report(replace(fitted.material, metrics=metrics | {"depth": depth})))
    assert "AUC of a linear head features.2 0.812 the end 0.750" in page.text


def test_a_network_of_very_many_channels_is_drawn_in_bars(fitted, monkeypatch):
    monkeypatch.setattr(writing, "MOST_CELLS", 10)
    page = Page(build_report(fitted.material))
    assert not [tag for tag in page.all("rect") if tag.attributes.get("class", "").startswith("kept ")]
    assert len(page.all("rect", class_="k5")) == len(fitted.material.widths)


def test_the_worst_mistakes_come_first_and_are_mistakes(fitted):
    judged = fitted.material.judged
    shown = mistakes.find_mistakes(fitted.material, names=True)
    assert 0 < len(shown) == min(8, mistakes.count_mistakes(judged, None))
    assert [one.probability for one in shown] == sorted((one.probability for one in shown), reverse=True)
    for one in shown:
        place = judged.names.index(one.title)
        assert one.label == fitted.material.info.classes[judged.labels[place]] != one.called
    assert all(one.overlay != one.picture for one in shown)
    assert f"{mistakes.count_mistakes(judged, None)} were called wrongly." in fitted.page.text


def test_the_page_says_what_the_intervals_of_calibration_do_not_know(fitted):
    assert "Whiskers: 95 % intervals, as if images were independent" in fitted.page.text
    assert "its interval may lie above it" in fitted.page.text


def test_evidence_is_painted_in_orange_where_it_is_for_and_blue_where_against():
    grey = np.full((4, 8, 3), 128, np.uint8)
    painted = mistakes.paint(grey, np.array([[1.0, -1.0]], np.float32)).astype(int)
    assert (painted[:, 0, 0] > painted[:, 0, 2]).all()
    assert (painted[:, -1, 0] < painted[:, -1, 2]).all()


def test_the_channels_that_decide_are_named_by_their_place_in_the_original(fitted):
    names = re.findall(r"features\.6 #(\d+) of 16", fitted.page.text)
    assert len(names) == min(12, len(fitted.material.info.kept["trunk.features.6"]))
    assert {int(name) for name in names} <= set(fitted.material.info.kept["trunk.features.6"])
    assert "Part of a training image, yes" in fitted.html


def test_the_card_counts_every_image_once(fitted):
    rows = {row.text.split()[0]: row.text.split()[1:] for row in fitted.page.all("tr")}
    images = fitted.metrics["images"]
    wanted = [str(images[name]) for name in ("train", "validation", "test")]
    assert rows["All"] == wanted
    assert [int(no) + int(yes) for no, yes in zip(rows["no"], rows["yes"], strict=True)] == [
        *map(int, wanted)
    ]
    assert sum(map(int, rows["Patients"])) == 24


def test_the_command_takes_only_what_differs_from_the_defaults():
    config = FitConfig(group_pattern=r"^(\d+) it's", augment=False, round_last=True, seed=3)
    command = write_command(config, "vgg16").replace(" \\\n   ", "")
    assert command == (
        "chanscale fit IMAGES --out RUN '--group-pattern=^(\\d+) it'\"'\"'s' --no-augment --round-last "
        "--seed=3 --backbone=vgg16"
    )


def test_of_images_that_were_an_object_no_command_is_told(fitted):
    assert fitted.metrics["images_from"] == "object"
    assert "No command line names the images, given as an object" in fitted.page.text
    metrics = fitted.metrics | {"images_from": "path"}
    assert "chanscale fit IMAGES" in build_report(replace(fitted.material, metrics=metrics))
    metrics.pop("images_from")  # as older runs have it
    assert "chanscale fit IMAGES" in build_report(replace(fitted.material, metrics=metrics))


def test_the_folder_of_the_weights_is_not_told(fitted):
    config = fitted.material.config.model_copy(update={"weights": Path("/home/someone/weights.h5")})
    html = build_report(replace(fitted.material, config=config))
    assert "weights.h5" in html
    assert "someone" not in html


def test_the_same_run_gives_the_same_page(fitted, tiny):
    assert build_report(fitted.material) == fitted.html


# --- what it must not do


def test_names_from_files_are_text_and_never_markup(evil):
    page = evil.page
    assert len(page.all("script")) == 2
    assert page.all("b") == []
    assert not [tag for tag in page.tags if any(name.startswith("on") for name in tag.attributes)]
    assert page.one("h1").text.strip() == " or ".join(reversed(EVIL))
    named = Page(build_report(evil.material, names=True))
    assert len(named.all("script")) == 2
    assert "<img src=x onerror=alert(2)></script>" in named.text
    assert {tag.attributes["src"][:5] for tag in named.all("img")} == {"data:"}


def test_what_is_embedded_for_the_script_cannot_end_it():
    value = {"name": "</script><!-- & <script>"}
    assert not re.search("[<>&]", embed(value))
    assert json.loads(embed(value)) == value


def test_no_patient_and_no_image_is_named_unless_asked_for(fitted):
    records = fitted.material.images.images.records
    assert not [one.name for one in records if one.name in fitted.html or one.group in fitted.html]
    assert "Test image " in fitted.page.text
    named = build_report(fitted.material, names=True)
    assert any(record.name in named for record in records)
    assert not any(record.group in named for record in records)


def test_nothing_is_loaded_from_elsewhere(fitted):
    for tag in fitted.page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert tag.attributes.get(name, "data:").startswith(("data:", "#")), tag
        assert "style" not in tag.attributes
    style = fitted.page.one("style").text
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style + fitted.page.all("script")[-1].text


def test_the_policy_lets_our_script_and_style_run_and_nothing_else(fitted):
    [policy] = [
        tag.attributes["content"]
        for tag in fitted.page.all("meta")
        if tag.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def hashed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "script-src": hashed(fitted.page.all("script")[-1].text),
        "style-src": hashed(fitted.page.one("style").text),
    }  # fmt: skip


def test_large_images_make_no_large_page(fitted):
    rng = np.random.default_rng(0)
    images = fitted.material.images.images
    noise = rng.integers(0, 256, (1400, 1000, 3)).astype(np.uint8)  # which no encoder makes small
    images = replace(images, records=tuple(replace(one, pixels=noise) for one in images.records))
    material = replace(fitted.material, images=_with(fitted.material.images, images))
    html = build_report(material)
    assert len(html.encode()) < LARGEST
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in pictures_of(html)]
    assert len(sizes) > 8
    assert max(max(size) for size in sizes) == mistakes.SIDE == 320


def _with(decoded, images):
    """Return decoded images that are still those they were, whose files have become others."""
    other = type(decoded)(images, image_size=decoded.image_size, channels=decoded.channels)
    other._cache = decoded._cache
    return other


def pictures_of(html):
    return re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)


def test_a_network_of_as_many_channels_as_are_drawn_makes_no_large_page(fitted):
    width = channel_map.MOST_CELLS // 2
    whole = list(range(width))
    info = replace(fitted.material.info, kept={"trunk.a": whole, "trunk.b": whole})
    material = replace(fitted.material, info=info, widths={"trunk.a": width, "trunk.b": width})
    html = build_report(material)
    assert html.count('<rect class="kept') == channel_map.MOST_CELLS
    assert len(html.encode()) < LARGEST


def test_a_failure_of_the_page_keeps_the_run(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("the page\nbroke")

    monkeypatch.setattr(runs, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        run = scale_and_select(
            tiny_classifier().trunk, draw(), config=tiny_config(scale_epochs=1), out=tmp_path / "run"
        )
    assert load_model(tmp_path / "run")[1].classes == ("no", "yes")
    assert not (tmp_path / "run" / REPORT).exists()
    assert np.isfinite(run.metrics["auc"]["value"])
    [said] = [record.getMessage() for record in caplog.records if "report" in record.getMessage()]
    assert "no report.html was written (the page broke)" in said
    assert "\n" not in said


# --- other kinds of runs


def test_more_than_two_classes_have_a_curve_each_and_a_whole_confusion_matrix(three):
    page = three.page
    assert [tag for tag in page.tags if tag.attributes.get("id") == "threshold"] == []
    curves_drawn = [tag for tag in page.all("path") if tag.attributes.get("class", "").startswith("curve c")]
    assert len(curves_drawn) == 3 + 1  # and that of calibration
    counts = [
        int(tag.text) for tag in page.all("td") if tag.attributes.get("class") in ("right", "wrong", "none")
    ]
    assert len(counts) == 9
    assert sum(counts) == three.metrics["n"]
    right = sum(int(tag.text) for tag in page.all("td", class_="right"))
    assert right / three.metrics["n"] == pytest.approx(three.metrics["accuracy"]["value"])


def test_of_very_many_classes_the_commonest_confusions_are_listed():
    matrix = np.diag([5] * 30)
    matrix[2, 7], matrix[4, 1] = 3, 1
    listed = writing._list_confusions(matrix, tuple(f"k{index}" for index in range(30)))
    assert listed == [("k2", "k7", 3), ("k4", "k1", 1)]


def test_without_test_images_each_section_says_so(untested):
    text = untested.page.text
    assert "how good it is has not been measured" in text
    assert text.count("No images were set aside for testing") == 5
    assert untested.page.all("script", id="data") == []
    assert "What was kept of the network" in text
    assert len([tag for tag in untested.page.all("circle") if "epoch" in tag.attributes["class"]]) == 4


def test_a_model_that_is_a_program_says_what_it_cannot_show(tmp_path, fitted):
    own = fit(tmp_path / "run", draw(), model=tiny_classifier().trunk)
    assert "chanscale fit" not in own.html
    assert "No command line names the network and the images, given as objects" in own.page.text
    model, info = load_model(tmp_path / "run")
    assert isinstance(model, Program)
    page = Page(build_report(replace(own.material, model=model, info=info)))
    assert "it gives no class maps" in page.text
    assert "what its channels contribute is not known" in page.text
    assert [tag.text for tag in page.all("output")] == [tag.text for tag in own.page.all("output")]


def test_figures_that_are_not_defined_are_said_to_be_so(fitted):
    nothing = {"value": None, "low": None, "high": None}
    metrics = fitted.metrics | {"auc": nothing, "validation_auc": None}
    page = Page(build_report(replace(fitted.material, metrics=metrics)))
    assert "not defined" in page.one("tr", data_figure="auc").text
    assert "(AUC) is not defined" in page.text


# --- the numbers behind the plots


def scores(count=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    positive = np.clip(rng.normal(0.35 + 0.3 * labels, 0.2), 0, 1).round(2).astype(np.float32)
    return np.stack([1 - positive, positive], 1), labels, np.repeat(np.arange(count // 2), 2)


def test_the_curve_has_the_area_of_scikit_learn_and_lies_in_its_band():
    shares, labels, groups = scores()
    roc = curves.find_roc(shares[:, 1], labels == 1, groups)
    assert roc.area == pytest.approx(roc_auc_score(labels, shares[:, 1]))
    at_grid = curves._read_curve(shares[:, 1], labels == 1)
    assert np.mean((roc.low <= at_grid) & (at_grid <= roc.high)) > 0.98
    assert (np.diff(roc.low) >= 0).all()
    assert (np.diff(roc.high) >= 0).all()
    assert 0 < (roc.high - roc.low).mean() < 0.5


def test_every_threshold_counts_what_lies_above_it():
    shares, labels, _ = scores()
    found = curves.find_thresholds(shares, labels)
    exact = shares[:, 1].astype(np.float64)
    for step in range(101):
        called = exact > step / 100
        assert found.true_positives[step] == np.sum(called & (labels == 1))
        assert found.false_positives[step] == np.sum(called & (labels == 0))
    assert found.true_positives[50] == np.sum((shares.argmax(1) == 1) & (labels == 1))


def test_the_bins_of_the_plot_hold_every_image_once():
    shares, labels, _ = scores()
    bins = curves.find_bins(shares, labels)
    assert sum(one.count for one in bins) == len(labels)
    assert sum(one.count * one.share for one in bins) == pytest.approx((labels == 1).sum())
    for one in bins:
        assert one.low <= one.mean <= one.high
        assert one.share_low <= one.share <= one.share_high


def test_wilson_intervals_are_the_published_ones():
    assert curves.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert curves.wilson(0, 10)[0] == 0


def test_the_confusion_matrix_counts_each_image_once():
    shares, labels, _ = scores()
    matrix = curves.confusion(shares, labels)
    assert matrix.sum() == len(labels)
    assert Counter(labels.tolist()) == {0: matrix[0].sum(), 1: matrix[1].sum()}
    assert matrix.trace() == np.sum(shares.argmax(1) == labels)


# --- the command


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Fitted:
    """A run whose images lie in a folder, as those of the command line do."""
    folder = tmp_path_factory.mktemp("stored")
    images = draw()
    for record in images.records:
        path = folder / "images" / images.classes[record.label] / record.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.pixels).save(path)
    return fit(folder / "run", folder / "images", group_pattern=r"^(\d+)_")


@pytest.fixture
def tiny(monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


def test_the_command_writes_the_page_that_fit_wrote(stored, tiny, tmp_path, capsys):
    out = tmp_path / "again.html"
    images = str(stored.folder.parent / "images")
    assert cli.run(["report", str(stored.folder), "--images", images, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert out.read_text(encoding="utf-8") == stored.html
    assert cli.run(["report", str(stored.folder), "--images", images, "--out", str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert cli.run(["report", str(stored.folder), "--images", images]) == 0


def test_an_older_run_gets_a_page_too(stored, tiny, tmp_path):
    """Its metrics.json does not tell how wide the original was; the network is built again."""
    for path in stored.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    metrics = {name: value for name, value in stored.metrics.items() if name != "widths"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    material = open_material(tmp_path, stored.folder.parent / "images", watcher=Watcher())
    assert material.widths == stored.material.widths
    assert build_report(material) == stored.html


def test_other_images_are_refused(stored, tiny, tmp_path):
    for record in stored.material.images.images.records:
        path = tmp_path / record.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(record.path) as image:
            Image.eval(image, lambda value: 255 - value).save(path)
    with pytest.raises(DataError, match="give the images that the run was made of"):
        open_material(stored.folder, tmp_path, watcher=Watcher())


def test_a_damaged_folder_is_one_line(stored, tiny, tmp_path, capsys):
    for path in stored.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"cannot read .*metrics\.json"):
        open_material(tmp_path, stored.folder.parent / "images", watcher=Watcher())
    assert cli.run(["report", str(tmp_path), "--images", str(stored.folder.parent / "images")]) == 2
    assert [line[:7] for line in capsys.readouterr().err.splitlines() if "error" in line] == ["error: "]


def test_metrics_of_an_older_version_are_refused_in_one_line(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(dict.fromkeys(WANTED - {"depth"}, 0)))
    with pytest.raises(
        ArtifactError, match=r"has no 'depth': it is of an older version of chanscale; fit .* again"
    ):
        read_metrics(path)


def test_what_is_alike_in_training_images_is_no_evidence(fitted):
    usual = mistakes.find_usual_map(fitted.material)
    assert usual.std() > 0
    maps = [
        mistakes.find_evidence(fitted.material, index, 1, usual)
        for index in spread(fitted.material.splits.train, 100)
    ]
    largest = np.abs(maps).max()
    assert largest > 0
    assert np.abs(np.mean(maps, axis=0)).max() < 1e-4 * largest


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (1, 40, 3), (1, 1, 3)])
def test_an_image_of_one_line_is_shown_as_it_is(fitted, shape):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    decoded = fitted.material.images
    records = [replace(record, path=None, pixels=pixels) for record in decoded.images.records]
    thin = _with(decoded, replace(decoded.images, records=tuple(records)))
    found = mistakes._read(replace(fitted.material, images=thin), 0)
    assert found.shape == (*shape[:2], 3)
    assert np.array_equal(found[..., 0], pixels if pixels.ndim == 2 else pixels[..., 0])
