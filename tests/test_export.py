"""What `chanscale export` writes is what the run computes, or it is not written."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from torch import nn

from chanscale import cli, export_run, load_model, scale_and_select
from chanscale.artifact import ModelInfo
from chanscale.conformal import PredictionSets
from chanscale.deploy_commands import _show_export
from chanscale.errors import (
    ArtifactError,
    ConfigError,
    InexactExportError,
    ModelError,
    UnreadableImageError,
)
from chanscale.export import agreement, forms
from chanscale.export.agreement import Agreement, compare, predict_image, raw_pixels
from chanscale.export.denormals import denormals_flushed, flushes_denormals
from chanscale.export.examples import draw_examples, read_whole
from chanscale.export.forms import Exported
from chanscale.export.int8_trial import Int8Trial
from chanscale.export.latency import Timing
from chanscale.export.onnx_file import describe_graph, export_onnx
from chanscale.export.quantising import quantise_onnx
from chanscale.export.runtime import CLASS_MAP, INPUT, PROBABILITIES, open_session, run_session, telling
from chanscale.onnx_proof import prove_graph
from chanscale.operating_point import OperatingPoint
from chanscale.own_images import open_own_images
from networks import build_classifier, describe, plain_trunk, randomise
from test_cli import OPTIONS, draw, error_of, files_below, words
from tiny_backbone import register
from tiny_fits import tiny_config

INFO = ModelInfo("tiny", ("no", "yes"), kept={}, preprocessing={}, image_size=32, channels=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the tiny backbone, and its images."""
    yield from make_run(tmp_path_factory.mktemp("made"))


def make_run(folder, *options):
    """Fit the tiny backbone, which stays registered until the generator is closed; yield the run, and its images."""
    data, run = draw(folder / "images"), folder / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch.setitem, monkeypatch.setattr)
        assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS, *options]) == 0
        yield run, data


@pytest.fixture(scope="module")
def graph(made):
    """The ONNX file of the run, as bytes, and the run's model."""
    model, info = load_model(made[0])
    return export_onnx(model, info, draw_examples(grey_only=False))[0], model, info


# --- ONNX


def test_the_graph_says_what_the_run_says_of_images_of_any_size_grey_or_colour(graph):
    content, model, info = graph
    agreed = compare(run_session(open_session(content)), model, info, draw_examples(12, grey_only=False))
    assert agreed.images == 12
    assert agreed.difference < 1e-5


def test_a_session_leaves_the_arithmetic_of_its_caller_alone(graph, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph[0])
    lines = [  # in a process of its own, since the first session of a process is what sets it
        "import sys; from pathlib import Path; import numpy as np",
        "from chanscale.export.runtime import open_session, run_session",
        "run = run_session(open_session(Path(sys.argv[1]), threads=1))",
        "halves = [np.float32(2e-39) / 2]",
        "run(np.zeros((1, 1, 32, 32), np.float32))",
        "print(all(halves + [np.float32(2e-39) / 2]))",
    ]
    said = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), path], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["True"]


def test_denormals_are_flushed_for_a_while_and_not_for_longer():
    with denormals_flushed():
        assert flushes_denormals()
        with denormals_flushed(False):
            assert not flushes_denormals()
            torch.set_flush_denormal(True)
        assert flushes_denormals()
    assert not flushes_denormals()


def test_a_batch_is_its_images_one_by_one(graph):
    run = run_session(open_session(graph[0]))
    pixels = np.concatenate([raw_pixels(image[:, :90, :90]) for image in draw_examples(3, grey_only=True)])
    found = run(pixels)
    assert found.shape == (3, 2)
    assert np.allclose(found, np.concatenate([run(image[None]) for image in pixels]), atol=1e-6)
    assert np.allclose(found.sum(1), 1, atol=1e-6)


def test_the_mean_of_the_class_map_gives_the_probability(graph):
    image = next(draw_examples(grey_only=True))
    probabilities, maps = open_session(graph[0]).run([PROBABILITIES, CLASS_MAP], {INPUT: raw_pixels(image)})
    assert maps.shape[:2] == (1, 1)
    assert 1 / (1 + np.exp(-maps.mean())) == pytest.approx(probabilities[0, 1], abs=1e-5)


def test_the_graph_states_its_axes_its_opset_and_that_it_is_no_device(graph):
    proto = onnx.load_from_string(graph[0])
    onnx.checker.check_model(proto, full_check=True)
    [pixels] = proto.graph.input
    axes = [axis.dim_param for axis in pixels.type.tensor_type.shape.dim]
    assert (pixels.name, axes) == (INPUT, ["batch", "channels", "height", "width"])
    assert [output.name for output in proto.graph.output] == [PROBABILITIES, CLASS_MAP]
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
    told = json.loads({entry.key: entry.value for entry in proto.metadata_props}["chanscale"])
    assert told["classes"] == ["clear", "spot"]
    assert "not a medical device" in told["notice"]


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_no_file_of_this_machine_is_named(made, tmp_path, form):
    content = export_run(made[0], form, out=tmp_path / "exported").path.read_bytes()
    assert b".py" not in content
    assert str(made[0]).encode() not in content


def test_a_filter_times_its_scale_is_what_the_graph_holds(graph):
    content, model, _ = graph
    held = {
        entry.name: onnx.numpy_helper.to_array(entry)
        for entry in onnx.load_from_string(content).graph.initializer
    }
    layer = model.get_submodule("trunk.features.3")
    wanted = layer.weight * layer.channel_scale.weight[:, None, None, None]
    assert np.array_equal(held["network.trunk.features.3.weight"], wanted.detach().numpy())


class DoubleTrunk(nn.Module):
    """A convolution in fp64, which ONNX Runtime has no kernel for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, dtype=torch.float64)

    def forward(self, x):
        return self.conv(x.double()).relu().float()


def test_a_network_that_onnx_runtime_does_not_run_is_one_line():
    model = build_classifier(DoubleTrunk().eval())
    with pytest.raises(
        ModelError, match=r"^ONNX Runtime cannot open the graph of this network: .*Conv[^\n]*--format torch"
    ):
        export_onnx(model, describe(model, {}), draw_examples(1, grey_only=False))


def test_what_onnx_runtime_cannot_run_or_quantise_is_one_line(graph):
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the graph [^\n]*Got: 2 Expected: 4"):
        run_session(open_session(graph[0]))(np.zeros((8, 8), np.float32))
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot quantise the graph [^\n]*$"):
        quantise_onnx(b"no graph", [])


def test_an_image_that_cannot_be_read_is_no_fault_of_onnx_runtime():
    with pytest.raises(UnreadableImageError, match="half an image"), telling("quantise"):
        raise UnreadableImageError("half an image")


def test_memory_that_onnx_runtime_lacks_is_lack_of_memory():
    said = "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 800"
    with pytest.raises(MemoryError, match="size 800"), telling("run"):
        raise RuntimeException(said)


# --- a program


def test_the_program_runs_without_our_code_and_says_the_same(made, tmp_path):
    exported = export_run(made[0], "torch", out=tmp_path / "model.pt2")
    assert exported.agreement.difference < 1e-5
    model, info = load_model(made[0])
    graph = torch.export.load(exported.path).module()
    for image in draw_examples(4, grey_only=False):
        found, maps = graph(torch.from_numpy(raw_pixels(image)))
        assert np.allclose(found.numpy(), predict_image(model, info, image), atol=1e-5)
        assert maps.dim() == 4


def test_a_network_of_the_users_own_is_exported_from_its_program(made, tmp_path):
    run = scale_and_select(
        randomise(plain_trunk()),
        made[1],
        config=tiny_config(group_pattern=r"^(\d+)_", image_size=32),
        out=tmp_path / "own",
    )
    assert load_model(run.folder)[1].rebuilt_by == "program"
    exported = export_run(run.folder)
    assert exported.agreement.difference < 1e-5
    assert len(onnx.load(exported.path).graph.output) == 1


# --- int8


def test_int8_is_calibrated_on_training_images_and_judged_on_the_others(made, tmp_path, monkeypatch):
    run, data = made
    read = []
    monkeypatch.setattr(
        forms, "read_whole", lambda images, indices: read.append(list(indices)) or read_whole(images, indices)
    )
    monkeypatch.setattr("chanscale.export.int8_trial.SECONDS", 0.0)
    exported = export_run(run, out=tmp_path / "small.onnx", images=data, int8=True)
    _, splits = open_own_images(data, run / "model.safetensors", load_model(run)[1])
    assert set(read[1]) <= set(splits.train)
    assert len(read[1]) == len(splits.train)
    with pytest.raises(
        ArtifactError, match=r"small\.onnx is in int8, whose filters are rounded .*; verify the graph in fp32"
    ):
        prove_graph(exported.path, load_model(run)[0])
    trial = exported.int8
    assert trial.images == len(splits.test)
    assert 0.5 < trial.auc_fp32 <= 1
    assert abs(trial.auc - trial.auc_fp32) < 0.1
    assert 0 < trial.largest_change < 0.2
    kinds = [entry.data_type for entry in onnx.load(exported.path).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) >= 3  # the weights of three convolutions


def test_the_agreement_of_int8_is_said_to_be_that_of_fp32(capsys):
    timing = Timing(1, 1, 1, 5)
    trial = Int8Trial(9, 0.9, 0.91, 0.0004, timing, timing)
    exported = Exported(Path("small.onnx"), 8, Agreement(8, 1e-7), trial)
    _show_export(exported)
    assert "from the run's, of the graph in fp32: 1.0e-07, over 8 images" in (said := words(capsys)[0])
    assert "a probability changes by 4.0e-04 at most" in said
    _show_export(replace(exported, int8=None))
    assert "fp32" not in words(capsys)[0]


def test_int8_wants_the_images_and_onnx(made):
    with pytest.raises(ConfigError, match="--images"):
        export_run(made[0], int8=True)
    with pytest.raises(ConfigError, match="ONNX alone"):
        export_run(made[0], "torch", images=made[1], int8=True)


# --- what is refused


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_what_differs_is_not_written(made, tmp_path, monkeypatch, form):
    monkeypatch.setattr(agreement, "predict_image", lambda *_: np.array([[0.3, 0.7]], np.float32))
    with pytest.raises(InexactExportError, match="nothing was written"):
        export_run(made[0], form, out=tmp_path / "model")
    assert files_below(tmp_path) == {}


def test_a_probability_that_is_no_number_is_a_difference(made, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "predict_image", lambda *_: np.full((1, 2), np.nan, np.float32))
    with pytest.raises(InexactExportError, match="nan"):
        export_run(made[0], out=tmp_path / "model.onnx")
    assert files_below(tmp_path) == {}


def test_an_exporter_that_fails_is_one_line(made, tmp_path, monkeypatch):
    def fail(*_, **__):
        cause = ValueError("no \x1b[96msuch\x1b[0m\noperator")
        raise RuntimeError(f"this is \x1b[96mstep 3/3\x1b[0m{' of exporting' * 20}") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"^the network cannot be written as ONNX: no such operator$"):
        export_run(made[0], out=tmp_path / "model.onnx")
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("name", ["model.safetensors", "novelty.safetensors", "program.pt2"])
def test_what_the_run_cannot_do_without_is_not_written_over(made, tmp_path, capsys, form, name):
    run = shutil.copytree(made[0], tmp_path / "run")
    (run / "program.pt2").touch()
    (tmp_path / "link").symlink_to(run / name)
    before = files_below(tmp_path)
    for out in (run / name, tmp_path / "link"):
        said = error_of(capsys, ["export", run, "--format", form, "--out", out])
        assert f"is the run's own {name}, and would be lost; name another --out" in said
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_a_missing_extra_says_how_to_get_it(made, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    line = error_of(capsys, ["export", made[0], "--out", tmp_path / "model.onnx"])
    assert line == f"error: this needs {missing}: pip install 'chanscale[export]'"
    assert files_below(tmp_path) == {}


def test_images_of_another_run_are_refused(made, tmp_path, capsys):
    other = draw(tmp_path / "other", patients=6)
    line = error_of(capsys, ["export", made[0], "--images", other])
    assert "splits.csv" in line


def test_a_model_file_without_its_run_cannot_tell_its_test_images(made, tmp_path):
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((made[0] / "model.safetensors").read_bytes())
    assert export_run(alone).path == tmp_path / "model.onnx"
    with pytest.raises(ArtifactError, match=r"no config\.yaml and splits\.csv"):
        export_run(alone, images=made[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no model at nowhere"),
        (["{run}", "--out", "no/folder/model.onnx"], "there is no folder"),
        (["{run}", "--format", "web", "--out", "."], "exists already"),
    ],
)
def test_bad_input_gets_one_line(made, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, ["export", *(argument.format(run=made[0]) for argument in arguments)])
    assert files_below(tmp_path) == {}


# --- the command


def test_the_command_writes_into_the_run_and_says_how_well_it_agrees(made, capsys):
    run, data = made
    assert cli.run(["export", str(run), "--images", str(data), "--json"]) == 0
    told = json.loads(words(capsys)[0])
    assert told["path"] == str(run / "model.onnx")
    assert told["size"] == (run / "model.onnx").stat().st_size
    assert told["agreement"]["images"] == 8
    assert told["agreement"]["difference"] < 1e-5
    assert cli.run(["export", str(run), "--format", "torch"]) == 0
    assert "Largest difference of a probability from the run's" in words(capsys)[0]
    assert (run / "model.pt2").is_file()


def test_a_run_that_left_out_unreadable_images_finds_its_own_again(made, tmp_path, capsys):
    data, run = draw(tmp_path / "images"), tmp_path / "run"
    (data / "clear" / "900_0.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch.setitem, monkeypatch.setattr)
        assert cli.run(["fit", str(data), "--out", str(run), "--skip-bad", *OPTIONS]) == 0
    info = load_model(run)[1]
    images, splits = open_own_images(data, run / "model.safetensors", info)
    assert len(images) == len(splits.train) + len(splits.validation) + len(splits.test) == 48
    assert not any("900" in record.name for record in images.records)
    words(capsys)
    assert cli.run(["report", str(run), "--images", str(data)]) == 0


def test_the_rules_of_the_model_travel_with_the_graph():
    assert not {"operating_point", "prediction_sets"} & describe_graph(INFO).keys()
    point, sets = OperatingPoint(0.25, 0.9, 20, 2), PredictionSets(0.8, (0.3, 0.1), (9, 9))
    told = describe_graph(replace(INFO, operating_point=point, prediction_sets=sets))
    assert told["operating_point"]["threshold"] == 0.25
    assert told["prediction_sets"]["least"] == (0.3, 0.1)


def test_int8_has_not_the_rules_of_other_probabilities(graph):
    content, _, info = graph
    described = onnx.load_from_string(content)
    [entry] = described.metadata_props
    entry.value = json.dumps(
        describe_graph(replace(info, prediction_sets=PredictionSets(0.8, (0.3, 0.1), (9, 9))))
    )
    small = onnx.load_from_string(
        quantise_onnx(described.SerializeToString(), draw_examples(1, grey_only=True))
    )
    told = {entry.key: entry.value for entry in small.metadata_props}["chanscale"]
    assert json.loads(told) == describe_graph(info)


def test_where_a_network_lay_is_not_told():
    info = replace(INFO, backbone="transformers:/home/someone/patients/resnet")
    assert info.network == "transformers:resnet"
    assert "someone" not in json.dumps(describe_graph(info))
    assert replace(info, backbone="monai:DenseNet121").network == "monai:DenseNet121"
    assert (
        replace(info, backbone="transformers:microsoft/resnet-18").network
        == "transformers:microsoft/resnet-18"
    )
