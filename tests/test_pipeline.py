"""What `scale_and_select` leaves behind when it cannot go on."""

import copy
import hashlib
import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from chanscale import cli
from chanscale.artifact import load_model, read_model, write_tensors
from chanscale.backbones import Preprocessing
from chanscale.catalogue import build_network
from chanscale.errors import (
    ArtifactError,
    BudgetError,
    ChanscaleError,
    ConfigError,
    DataError,
    ModelError,
    SplitError,
)
from chanscale.evaluation import evaluate
from chanscale.originals import open_original
from chanscale.pipeline import scale_and_select
from chanscale.programs import load_program, save_program
from chanscale.progress import Watcher
from chanscale.pruning import ROUNDING
from chanscale.runs import RunFolder
from networks import build_classifier, know_groups, randomise, require_slices, same_tensors
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


def test_epochs_are_kept_where_images_cannot_be_read_any_more(tmp_path, caplog):
    """As when a share of files is away for a minute."""
    images, away = tmp_path / "images", tmp_path / "away"
    for index, record in enumerate(IMAGES.images.records):
        folder = images / IMAGES.images.classes[record.label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.pixels).save(folder / f"{index}.png")

    class GoesAway(Watcher):
        def on_epoch(self, moment, row):  # noqa: ARG002
            if moment.epoch == 1:
                images.rename(away)

    def fit(**options):
        config = tiny_config(cache_gib=0.0)
        return scale_and_select(
            tiny_classifier().trunk, images, config=config, out=tmp_path / "run", **options
        )

    with pytest.raises(DataError):
        fit(watcher=GoesAway())
    assert "run.partial; go on with --resume" in caplog.text
    away.rename(images)
    assert len(fit(resume=True).history) == 4


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path):
    config = tiny_config(backbone="Sequential")
    other = RunFolder(tmp_path / "run", config)
    other.begin(IMAGES.images, SPLITS)
    with pytest.raises(ArtifactError, match="another process works in"):
        fit_tiny(tmp_path / "run", resume=True)
    assert (tmp_path / "run.partial" / "config.yaml").exists()
    other.release()


def test_a_run_does_not_go_on_from_what_another_began_meanwhile(tmp_path):
    config = tiny_config(backbone="Sequential")
    opened = RunFolder.open(tmp_path / "run", config, resume=False)
    other = RunFolder.open(tmp_path / "run", tiny_config(backbone="Sequential", seed=7), resume=False)
    other.begin(IMAGES.images, SPLITS)
    other.release()  # interrupted
    with pytest.raises(ArtifactError, match="was begun by another process"):
        opened.begin(IMAGES.images, SPLITS)
    opened.discard()
    assert "seed: 7" in (tmp_path / "run.partial" / "config.yaml").read_text()


def test_label_columns_are_for_a_table(tmp_path):
    with pytest.raises(ConfigError, match="`label_columns` is for a CSV table"):
        scale_and_select("vgg16", tmp_path, config=tiny_config(label_columns="a,b"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.jit.script, "a TorchScript network cannot be scaled; pass the nn.Module that it was made of"),
        (nn.Module.double, r"Sequential has weights of torch\.float64; pass it as fp32, `net\.float\(\)`"),
        (nn.Module.bfloat16, r"has weights of torch\.bfloat16"),
    ],
    ids=["script", "fp64", "bf16"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_network_that_is_compiled_or_not_in_fp32_is_refused_in_one_line(change, words):
    network = change(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.raises(ModelError, match=words):
        open_original(network, torch.rand(2, 1, 16, 16))


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
        (Dictionary(), "wrap it in a module whose forward returns one tensor"),
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


def test_a_network_of_the_users_own_comes_back_as_a_program_or_from_the_original(tmp_path):
    run = fit_tiny(tmp_path / "run")
    program, info = load_model(tmp_path / "run")
    x = torch.rand(3, info.channels, info.image_size, info.image_size)
    with torch.no_grad():
        torch.testing.assert_close(program(x), run.model(x))
    assert (info.rebuilt_by, program.classes, program.training) == ("program", run.model.classes, False)
    loaded, _ = load_model(tmp_path / "run", trunk=tiny_classifier().trunk)
    assert same_tensors(loaded, run.model)
    (tmp_path / "run" / "program.pt2").unlink()
    with pytest.raises(ArtifactError, match=r"there is no program at .*; in Python, load_model"):
        load_model(tmp_path / "run")


class Fickle(nn.Module):
    """A trunk that looks at its values, which no program can."""

    def __init__(self):
        super().__init__()
        self.layers = tiny_classifier().trunk

    def forward(self, x):
        x = self.layers(x)
        return x if float(x.detach().sum()) > -1e9 else -x


def test_a_network_that_cannot_be_exported_needs_the_original(tmp_path, caplog):
    run = scale_and_select(Fickle(), IMAGES.images, config=tiny_config(), out=tmp_path / "run")
    assert "cannot be exported" in caplog.text
    with pytest.raises(ArtifactError, match="pass that network as `trunk`"):
        load_model(tmp_path / "run")
    loaded, info = load_model(tmp_path / "run", trunk=Fickle())
    assert info.rebuilt_by == run.metrics["rebuilt_by"] == "network"
    assert same_tensors(loaded, run.model)


class Resident(nn.Module):
    """A classifier with a residual stream, a depthwise convolution, a gate, and a head of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.BatchNorm2d(24), nn.SiLU(), nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16), nn.Dropout(0.1),
        )  # fmt: skip
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1)
        )
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.body(x) * torch.sigmoid(self.gate(x)))
        return self.classifier(x.mean((2, 3)))


@pytest.fixture(scope="module")
def resident():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(Resident()).eval()


RESIDENT = {"budget": 0.5, "round_to": 1}


def test_a_classifier_of_the_users_own_is_scaled_and_loses_its_head(resident, tmp_path):
    before = copy.deepcopy(resident)
    config = tiny_config(**RESIDENT)
    run = scale_and_select(resident, IMAGES.images, config=config, out=tmp_path / "run")
    assert same_tensors(resident, before)
    assert run.info.head == "classifier"
    assert run.metrics["parameters"]["removed"] >= 0.5
    assert run.metrics["parameters"]["full"] == sum(p.numel() for p in resident.parameters())
    assert run.metrics["groups"]["protected"] == {}
    changes = [row["removal_change"] for row in run.history if row["removal_change"] is not None]
    assert changes
    assert max(changes) < ROUNDING
    require_slices(
        run.model.trunk, know_groups(resident, torch.rand(2, 3, 32, 32)), without_prefix(run.info.kept)
    )
    loaded, _ = load_model(tmp_path / "run", trunk=resident)
    assert same_tensors(loaded, run.model)


@pytest.fixture(scope="module")
def weights_of_monai(tmp_path_factory):
    """A file of random weights of MONAI's ResNet-10, as a hospital would bring its own."""
    path = tmp_path_factory.mktemp("weights") / "resnet10.safetensors"
    save_file(randomise(build_network("monai:resnet10")).state_dict(), path)
    return path


def test_a_network_of_a_library_is_named_and_rebuilt_by_its_name(weights_of_monai, tmp_path):
    config = tiny_config(budget=0.5, scale_epochs=1, refine_epochs=1, weights=weights_of_monai)
    run = scale_and_select("monai:resnet10", IMAGES.images, config=config, out=tmp_path / "run")
    assert (run.info.backbone, run.info.head, run.info.rebuilt_by) == ("monai:resnet10", "fc", "name")
    assert not (tmp_path / "run" / "program.pt2").exists()
    loaded, _ = load_model(tmp_path / "run")
    assert same_tensors(loaded, run.model)
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), run.model(x))


def test_a_name_of_nothing_is_an_error_before_any_image_is_read(tmp_path):
    with pytest.raises(ConfigError, match="is no source of networks"):
        scale_and_select("keras:VGG16", tmp_path / "nowhere", out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def without_prefix(kept):
    return {name.removeprefix("trunk."): torch.tensor(indices) for name, indices in kept.items()}


class StopError(Exception):
    pass


class StopIn(Watcher):
    """Stops a run in an epoch, before that is saved."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, moment, _row):
        if moment.epoch == self.epoch:
            raise StopError


def test_any_network_resumes_where_it_stopped(resident, tmp_path):
    config = tiny_config(**RESIDENT)
    undisturbed = scale_and_select(resident, IMAGES.images, config=config)
    with pytest.raises(StopError):
        scale_and_select(resident, IMAGES.images, config=config, out=tmp_path / "run", watcher=StopIn(2))
    resumed = scale_and_select(resident, IMAGES.images, config=config, out=tmp_path / "run", resume=True)
    assert same_tensors(resumed.model, undisturbed.model)


def test_the_gradient_penalty_removes_on_the_way():
    config = tiny_config(penalty="gradient", scale_epochs=8, refine_epochs=0, round_to=1, threshold=0.3)
    history = scale_and_select(tiny_classifier().trunk, IMAGES.images, config=config).history
    left = [row["parameters"] for row in history]
    assert left[-2] < left[0]
    assert max(row["removal_change"] or 0 for row in history) > 0


def test_what_is_no_network_is_an_error_before_any_image_is_read(tmp_path):
    wrong = [
        ({"model": Resident}, "must be the name of a network, or an nn.Module"),
        (
            {"model": tiny_classifier().trunk, "preprocessing": {"mean": 0}},
            "must be a chanscale.Preprocessing",
        ),
        ({"model": "vgg16", "config": tiny_config(weights="nowhere.h5")}, "there is no file nowhere.h5"),
        (
            {"model": tiny_classifier().trunk, "config": tiny_config(weights="a.h5")},
            "an object brings its own",
        ),
    ]
    for options, words in wrong:
        with pytest.raises(ChanscaleError, match=words):
            scale_and_select(data=tmp_path / "nowhere", out=tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_another_preprocessing(tmp_path):
    options = {"config": tiny_config(), "out": tmp_path / "run"}
    with pytest.raises(StopError):
        fit_with(Preprocessing(scale=2.0), watcher=StopIn(1), **options)
    with pytest.raises(ConfigError, match="resume it with the same network"):
        fit_with(Preprocessing(), resume=True, **options)
    assert fit_with(Preprocessing(scale=2.0), resume=True, **options).info.preprocessing["scale"] == 2


def fit_with(preprocessing, **options):
    return scale_and_select(tiny_classifier().trunk, IMAGES.images, preprocessing=preprocessing, **options)


def test_a_program_takes_grey_images_where_it_was_made_for_colour_and_no_others(tmp_path):
    images = tiny_images(channels=3).images
    run = scale_and_select(tiny_classifier().trunk, images, config=tiny_config(), out=tmp_path / "run")
    program, _ = load_model(tmp_path / "run")
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(grey), run.model(grey))
    for shape in ((2, 2, 32, 32), (2, 3, 48, 48), (0, 3, 32, 32), (3, 32, 32)):
        with pytest.raises(ModelError, match=r"takes images \(N, 3, 32, 32\)"):
            program(torch.rand(shape))


def test_a_program_of_grey_images_sees_colour_as_the_network_does(tmp_path):
    run = fit_tiny(tmp_path / "run")
    program, info = load_model(tmp_path / "run")
    assert (info.channels, program.shape) == (1, (3, 32, 32))
    grey, colour = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for images in (grey, colour):
            torch.testing.assert_close(program(images), run.model(images))
    assert not torch.allclose(program(colour), program(colour.mean(1, keepdim=True)))


def test_a_program_of_a_folded_network_refuses_colour_in_one_line(tmp_path, capsys):
    scale_and_select(
        tiny_classifier().trunk, IMAGES.images, config=tiny_config(fold_grey=True), out=tmp_path / "run"
    )
    Image.new("RGB", (40, 40), (200, 10, 90)).save(tmp_path / "colour.png")
    assert cli.run(["predict", str(tmp_path / "run"), str(tmp_path / "colour.png")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (
        "colour.png is in colour, and the model takes grey images alone; make it grey. Or leave it out"
        in line
    )
    program, _ = load_model(tmp_path / "run")
    with pytest.raises(ModelError, match=r"takes images \(N, 1, 32, 32\)"):
        program(torch.ones(1, 3, 32, 32))


def test_a_program_that_was_made_for_grey_alone_still_loads(tmp_path):
    fit_tiny(tmp_path / "run")
    tensors, metadata = read_model(tmp_path / "run" / "model.safetensors")
    model, _ = load_model(tmp_path / "run", trunk=tiny_classifier().trunk)
    path = tmp_path / "run" / "program.pt2"
    metadata["info"]["program"] = save_program(model, (1, 32, 32), path)  # as earlier versions did
    write_tensors(tmp_path / "run" / "model.safetensors", tensors, metadata)
    program, _ = load_model(tmp_path / "run")
    assert program.shape == (1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(torch.ones(2, 1, 32, 32)), model(torch.ones(2, 1, 32, 32)))
    with pytest.raises(ModelError, match=r"takes images \(N, 1, 32, 32\)"):
        program(torch.ones(2, 3, 32, 32))


def test_a_program_holds_no_image_and_only_its_own_model_takes_it(tmp_path):
    fit_tiny(tmp_path / "run")
    path = tmp_path / "run" / "program.pt2"
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if "sample_inputs" in name]
        args, _ = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    assert not any(tensor.any() for tensor in args)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the program that was saved with this model"):
        load_model(tmp_path / "run")


def test_a_program_that_would_be_unpickled_is_refused(tmp_path):
    fit_tiny(tmp_path / "run")
    path = tmp_path / "run" / "program.pt2"
    forged = tmp_path / "forged.pt2"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(forged, "w") as copy_of_it:
        for item in whole.namelist():
            content = whole.read(item)
            if item.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            copy_of_it.writestr(item, content)
    digest = hashlib.sha256(forged.read_bytes()).hexdigest()
    with pytest.raises(ArtifactError, match="is a pickled object"):
        load_program(forged, ("no", "yes"), digest=digest)
