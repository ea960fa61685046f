"""What `chanscale explain` writes: the answer of the run, taken apart, in a folder that is whole or not there."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from chanscale import cli, explain_run, load_model, scale_and_select
from chanscale.artifact import save_model
from chanscale.errors import ArtifactError, ConfigError, ModelError, SplitError
from chanscale.explain import explanation
from chanscale.explain.overlays import AGAINST, FOR, full_colour, paint_map
from chanscale.explain.places import file_names, shown_name
from chanscale.predictions import predict_images
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from chanscale.wording import NOTICE
from networks import attach, build_classifier, describe, plain_trunk, randomise, renew_statistics, set_scales
from test_cli import OPTIONS, draw, error_of, files_below, words
from test_export import make_run
from tiny_backbone import TinyTrunk
from tiny_fits import tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the tiny backbone, and its images."""
    yield from make_run(tmp_path_factory.mktemp("made"), "--depth=full")


@pytest.fixture(scope="module")
def three(made, tmp_path_factory):
    """A pruned model of three classes that was never trained, and images."""
    folder = tmp_path_factory.mktemp("three")
    data = draw(folder / "images", patients=6, classes=("clear", "other", "spot"))
    model = attach(build_classifier(TinyTrunk(), classes=("clear", "other", "spot")))
    kept = dict(set_scales(model).kept)
    model = renew_statistics(prune_channels(model, ChannelSelection(kept)))
    (folder / "run").mkdir()
    save_model(model, describe(model, kept, backbone="tiny"), folder / "run" / "model.safetensors")
    return folder / "run", data


@pytest.fixture(scope="module")
def own(made, tmp_path_factory):
    """A run of a network of the user's own, which reloads as a program."""
    config = tiny_config(group_pattern=r"^(\d+)_", image_size=32)
    out = tmp_path_factory.mktemp("own") / "run"
    return scale_and_select(randomise(plain_trunk()), made[1], config=config, out=out).folder


def read(folder, name="index"):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def first_images(data, count=2):
    return sorted((data / "spot").iterdir())[:count]


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def one_of_each(data):
    return [min(folder.iterdir()) for folder in sorted(data.iterdir())]


# --- what is written


@pytest.mark.parametrize("fixture", ["made", "three"])
def test_the_figures_are_those_of_predict_and_add_up(request, tmp_path, fixture):
    run, data = request.getfixturevalue(fixture)
    images = one_of_each(data)
    explained = explain_run(run, images, out=tmp_path / "out", top=2)
    model, info = load_model(run)
    predictions = predict_images(model, info, images).to_dicts()
    for entry, prediction in zip(explained.index["images"], predictions, strict=True):
        told = read(tmp_path / "out", entry["figures"].removesuffix(".json"))
        assert told["predicted"] == prediction["predicted"]
        assert told["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-6)
        assert len(told["channels"]) == 2
        parts = [channel["contribution"] for channel in told["channels"]]
        assert abs(parts[0]) >= abs(parts[1])
        assert told["bias"] + sum(parts) + told["rest"]["contribution"] == pytest.approx(
            told["logit"], rel=1e-6
        )
        assert told["rest"]["channels"] == info.widths["trunk.features.6"] - 2
        assert told["map"]["mean"] == pytest.approx(told["logit"], rel=1e-6)
        assert told["notice"] == NOTICE


def test_a_colour_image_is_named_where_the_model_takes_grey_ones_alone(made, tmp_path, capsys):
    run = tmp_path / "grey"
    assert cli.run(["fit", str(made[1]), "--out", str(run), *OPTIONS, "--fold-grey"]) == 0
    capsys.readouterr()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "colour.png")
    line = error_of(capsys, ["explain", run, tmp_path / "colour.png", "--out", tmp_path / "why"])
    assert "colour.png is in colour, and the model takes grey images alone" in line


def test_two_classes_are_explained_by_the_log_odds_of_the_second(made, tmp_path):
    told = explain_run(made[0], one_of_each(made[1]), out=tmp_path / "out").index["images"]
    assert {entry["explained"] for entry in told} == {"the log-odds of spot"}
    assert {entry["predicted"] for entry in told} == {"clear", "spot"}
    assert all((entry["logit"] > 0) == (entry["predicted"] == "spot") for entry in told)


def test_three_classes_are_explained_by_the_logit_of_the_most_probable(three, tmp_path):
    told = explain_run(three[0], one_of_each(three[1]), out=tmp_path / "out").index["images"]
    assert {entry["explained"] for entry in told} == {f"the logit of {entry['predicted']}" for entry in told}


def test_a_channel_is_named_with_its_index_in_the_original(made, tmp_path):
    explain_run(made[0], first_images(made[1], 1), out=tmp_path / "out")
    info = load_model(made[0])[1]
    kept = info.kept["trunk.features.6"]
    for channel in read(tmp_path / "out", first_images(made[1])[0].stem)["channels"]:
        assert channel["original_index"] == kept[channel["position"]]
        assert channel["name"] == f"features.6 #{channel['original_index']} of 16"
        assert channel["scale"] != 0
        assert channel["circuit_text"][0] == channel["name"]
        assert channel["circuit"]["feeders"][0]["channel"]["original"] in info.kept["trunk.features.3"]
        assert channel["circuit"]["feeders"][0]["feeders"][0]["stop"] == "these are the colours of the image"


def test_with_its_images_the_map_is_relative_and_patches_are_cut(made, tmp_path):
    run, data = made
    explained = explain_run(run, first_images(data), out=tmp_path / "out", data=data, top=1)
    for answer in explained.answers:
        wanted = answer.logit - answer.usual_logit
        assert float(answer.evidence.values.mean()) == pytest.approx(wanted, abs=1e-9)
    index = read(tmp_path / "out")
    train = sum(",train" in line for line in (run / "splits.csv").read_text().splitlines())
    assert index["training_images"] == train
    assert index["relative"]
    assert index["receptive_field"] == [22, 22]
    assert index["patches"]
    for sheet in index["patches"]:
        assert 1 <= len(sheet["patches"]) <= 6
        activations = [patch["activation"] for patch in sheet["patches"]]
        assert activations == sorted(activations, reverse=True)
        assert len({patch["training_image"] for patch in sheet["patches"]}) == len(activations)
        assert size_of(tmp_path / "out" / sheet["file"])[0] > 400


def test_the_picture_shows_the_image_at_its_own_aspect(made, tmp_path):
    Image.fromarray(np.full((40, 80), 128, np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((3000, 1500), 128, np.uint8)).save(tmp_path / "tall.png")
    explain_run(made[0], [tmp_path / "wide.png", tmp_path / "tall.png"], out=tmp_path / "out")
    wide, tall = (size_of(tmp_path / "out" / f"{name}.png") for name in ("wide", "tall"))
    assert (wide[0], tall[0]) == (640 + 430 + 84, 512 + 430 + 84)
    assert tall[1] > 1024


def test_the_same_call_gives_the_same_bytes(made, tmp_path):
    for name in ("first", "second"):
        explain_run(made[0], first_images(made[1], 1), out=tmp_path / name, data=made[1], top=2)
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second")
    )
    assert first == second


def test_a_map_is_blue_against_orange_for_and_clear_where_it_is_zero():
    painted = paint_map(np.array([[-1.0, 0.0, 1.0]]), (3, 1), 1.0)[0]
    assert tuple(painted[0, :3]) == AGAINST
    assert tuple(painted[2, :3]) == FOR
    assert painted[0, 3] == painted[2, 3] > 100
    assert painted[1, 3] == 0
    assert full_colour(np.zeros((2, 2))) == 0
    assert (paint_map(np.zeros((2, 2)), (4, 4), 0.0)[..., 3] == 0).all()


# --- names


def test_images_of_one_name_do_not_overwrite_each_other(made, tmp_path):
    for folder, shade in (("one", 20), ("two", 200)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((32, 32), shade, np.uint8)).save(tmp_path / folder / "same.png")
    explained = explain_run(made[0], [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    files = [(entry["image"], entry["figures"]) for entry in explained.index["images"]]
    assert files == [
        (str(tmp_path / "one/same.png"), "same.json"),
        (str(tmp_path / "two/same.png"), "same_2.json"),
    ]
    for image, file in files:
        assert read(tmp_path / "out", file.removesuffix(".json"))["image"] == image


def test_no_two_names_are_the_same_on_any_system():
    names = ["a/x.png", "b/X.PNG", "x_2.png", "index.png", "patches.tif", "$\\n?.png", "...png", "é.png"]
    found = file_names(names)
    assert found == ["x", "X_2", "x_2_2", "index_2", "patches_2", "n", "image", "é"]
    assert len({name.casefold() for name in found}) == len(names)


def test_names_that_cannot_be_printed_are_escaped(made, tmp_path, capsys):
    image = tmp_path / "$a_1$ \n\udcff 肺.png"
    shutil.copy(first_images(made[1])[0], image)
    assert cli.run(["explain", str(made[0]), str(image), "--out", str(tmp_path / "out")]) == 0
    told = read(tmp_path / "out")["images"][0]
    assert told["image"].endswith("$a_1$ \\n\\udcff 肺.png")
    assert (tmp_path / "out" / told["picture"]).is_file()
    assert shown_name("a\tb") == "a\\tb"
    words(capsys)


# --- other methods


@pytest.mark.parametrize("method", ["grad-cam", "integrated-gradients"])
def test_other_maps_are_shown_beside_the_same_channels(made, tmp_path, method):
    pytest.importorskip("captum", reason="needs: pip install 'chanscale[explain]'")
    image = first_images(made[1])[0]
    ours = explain_run(made[0], image, out=tmp_path / "ours").answers[0]
    other = explain_run(made[0], image, out=tmp_path / "other", method=method).answers[0]
    assert other.channels == ours.channels
    if method == "grad-cam":
        both = torch.stack([ours.evidence.values.flatten(), other.evidence.values.flatten()])
        assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(1, abs=1e-6)
    else:
        assert other.evidence.values.shape == (32, 32)
        assert "Integrated gradients from a black image" in other.evidence.caption


def test_a_program_is_explained_by_integrated_gradients(made, own, tmp_path):
    pytest.importorskip("captum", reason="needs: pip install 'chanscale[explain]'")
    image = first_images(made[1])[0]
    explained = explain_run(own, image, out=tmp_path / "out", method="integrated-gradients")
    told = read(tmp_path / "out", image.stem)
    assert told["channels"] == []
    assert told["bias"] is None
    assert np.abs(explained.answers[0].evidence.values.numpy()).max() > 0


@pytest.mark.parametrize(
    "options", [{}, {"method": "grad-cam"}, {"data": "x", "method": "integrated-gradients"}]
)
def test_of_a_program_nothing_else_can_be_had(made, own, tmp_path, options):
    with pytest.raises(ConfigError, match="use --method integrated-gradients, without --images"):
        explain_run(own, first_images(made[1]), out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_without_captum_the_command_names_the_extra(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    call = ["explain", made[0], made[1], "--out", tmp_path / "out", "--method", "grad-cam"]
    assert "pip install 'chanscale[explain]'" in error_of(capsys, call)


# --- the command


def test_the_command_shows_a_row_for_each_image_and_the_notice(made, tmp_path, capsys):
    images = [str(path) for path in first_images(made[1])]
    assert cli.run(["explain", str(made[0]), *images, "--out", str(tmp_path / "out"), "--top", "1"]) == 0
    out, _ = words(capsys)
    assert NOTICE in " ".join(out.split())
    assert f"{tmp_path / 'out'}: a picture and its figures" in " ".join(out.split())
    assert sorted(files_below(tmp_path / "out")) == sorted(
        ["index.json", *(f"{path.stem}.{kind}" for path in first_images(made[1]) for kind in ("json", "png"))]
    )


def test_json_is_the_index(made, tmp_path, capsys):
    image = str(first_images(made[1])[0])
    assert cli.run(["explain", str(made[0]), image, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(words(capsys)[0])
    assert told.pop("folder") == str(tmp_path / "out")
    assert told == read(tmp_path / "out")
    assert told["no_patches"] == "they are cut from the training images: give the run's set (--images)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--top", "0"], "Invalid value for '--top'"),
        (["--method", "magic"], "is not one of 'class-map'"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--out", "there"], "there exists already; remove it, or name another --out"),
        (["--out", "no/where"], "is no folder that can be written to"),
        (["missing.png"], "missing.png does not exist"),
        (["there/text.png"], "text.png: wanted a PNG, JPEG, TIFF or DICOM image"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(made, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "text.png").write_text("no image")
    call = ["explain", made[0], first_images(made[1])[0], *change]
    assert message in error_of(capsys, call if "--out" in change else [*call, "--out", "out"])
    assert sorted(files_below(tmp_path)) == ["there/text.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_among_the_images_is_refused(made, tmp_path):
    with pytest.raises(ConfigError, match="lies in the images' folder"):
        explain_run(made[0], made[1], out=made[1] / "out")
    with pytest.raises(ConfigError, match="lies in the images' folder"):
        explain_run(made[0], first_images(made[1]), out=made[1] / "out", data=made[1])


def test_images_that_are_not_the_runs_are_refused(made, tmp_path):
    other = draw(tmp_path / "other", patients=6)
    with pytest.raises(SplitError, match="differ in"):
        explain_run(made[0], first_images(made[1]), out=tmp_path / "out", data=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"), [({"top": 0}, "`top` must be 1"), ({"method": "x"}, "`method` must be")]
)
def test_wrong_options_are_refused_in_python_too(made, tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        explain_run(*made, out=tmp_path / "out", **option)


def test_what_breaks_off_leaves_nothing_behind(made, tmp_path, monkeypatch):
    def fail(*_):
        raise ModelError("broken")

    monkeypatch.setattr(explanation, "draw_overlay", fail)
    with pytest.raises(ModelError, match="broken"):
        explain_run(*made, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(made, tmp_path, monkeypatch):
    monkeypatch.setattr(explanation, "_index", lambda *_: (tmp_path / "out").mkdir() or {})
    with pytest.raises(ArtifactError, match="exists already"):
        explain_run(made[0], first_images(made[1], 1), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_names_are_short_enough_for_file_systems_and_none_of_a_device():
    long, device = file_names(["肺" * 80 + ".png", "NUL.png"])
    assert 100 < len(long.encode()) <= 150
    assert set(long) == {"肺"}
    assert device == "NUL_2"
