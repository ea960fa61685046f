"""One bit that is not the checkpoint's is found, and named."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from chanscale import cli
from chanscale.artifact import ModelInfo, load_model, save_model
from chanscale.attaching import merge_scales
from chanscale.backbones import BACKBONES
from chanscale.delta import save_delta
from chanscale.errors import ArtifactError, ModelError
from chanscale.export.forms import export_run
from chanscale.onnx_proof import prove_graph
from chanscale.provenance import Origins, prove, same_bits
from chanscale.weights import cache_path, weights_status
from networks import describe, same_tensors
from public_networks import NAME, TRUNKS, build_model, register, save_run

SIGN = torch.tensor(-(2**31), dtype=torch.int32)


def flip(tensor, *, mask=1, place=0):
    """Flip bits of one number of `tensor`, in place."""
    whole = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor.view(whole).view(-1)[place] ^= mask


def proof_of(model, info):
    return prove(model.state_dict(), info, Origins().find(info))


@pytest.fixture(params=TRUNKS)
def model_and_info(request, monkeypatch):
    register(monkeypatch, request.param)
    return build_model()


def test_every_frozen_tensor_is_a_slice(model_and_info):
    model, info = model_and_info
    proof = proof_of(model, info)
    frozen = {f"{layer.layer}.{item.name}" for layer in proof.layers for item in layer.tensors}
    counts = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    own = proof.scales.keys() | proof.head.keys()
    assert not proof.others
    assert frozen | counts | own == model.state_dict().keys()
    assert all(set(layer.kept) <= set(range(layer.width)) for layer in proof.layers)
    assert any(len(layer.kept) < layer.width for layer in proof.layers)
    convs = [layer for layer in proof.layers if layer.kind == "filters"]
    assert proof.count("filters") == (sum(len(layer.kept) for layer in convs), len(convs))


def test_one_flipped_bit_in_any_frozen_tensor_is_found_and_named(model_and_info):
    model, info = model_and_info
    origin = Origins().find(info)
    positions = origin.positions(info.kept)
    for name in origin.slices(info.kept):
        tensors = {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in model.state_dict().items()
        }
        flip(tensors[name], place=tensors[name].numel() - 1)
        with pytest.raises(ArtifactError) as caught:
            prove(tensors, info, origin)
        message = str(caught.value)
        assert message.startswith(f"{name!r} is not what was published")
        assert "\n" not in message
        if tensors[name].dim():
            kept = positions[name.rpartition(".")[0]]
            assert f"filter {len(kept) - 1} ({kept[-1]} in {NAME}), 1 of " in message


def test_a_changed_scale_or_head_is_no_matter_of_the_checkpoint(model_and_info):
    model, info = model_and_info
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in (next(name for name in tensors if "channel_scale" in name), "head.linear.weight"):
        flip(tensors[name])
    assert prove(tensors, info, Origins().find(info)).scales


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_bits_are_compared_and_not_values(value):
    one, other = torch.full((2, 3), value), torch.full((2, 3), value)
    assert same_bits(one, other)
    flip(other, mask=SIGN, place=4)
    assert not same_bits(one, other)
    assert not same_bits(one, one.double())
    assert not same_bits(one, one.view(3, 2))


def test_another_payload_of_a_nan_is_another_number():
    one = torch.full((3,), float("nan"))
    other = one.clone()
    flip(other, mask=2)
    assert other.isnan().all()
    assert not same_bits(one, other)


def test_all_that_differ_are_counted(monkeypatch):
    register(monkeypatch)
    model, info = build_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        tensors["trunk.3.weight"][2:5] += 1
    with pytest.raises(ArtifactError, match=r"filter 2 .*weights differ; 2 more differ too"):
        prove(tensors, info, Origins().find(info))


def test_filters_in_another_order_are_not_the_slice(monkeypatch):
    register(monkeypatch)
    model, info = build_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["trunk.0.weight"] = tensors["trunk.0.weight"].flip(0)
    with pytest.raises(ArtifactError, match=r"'trunk\.0\.weight' is not what was published"):
        prove(tensors, info, Origins().find(info))


def test_a_folded_first_convolution_is_said_to_be_no_slice(monkeypatch):
    register(monkeypatch)
    model, info = build_model(folded=True)
    proof = proof_of(model, info)
    assert proof.folded == "trunk.0"
    assert "trunk.0" not in [layer.layer for layer in proof.layers]
    assert list(proof.others) == ["trunk.0.weight"]


def test_one_flipped_bit_in_a_folded_convolution_is_found(monkeypatch):
    register(monkeypatch)
    model, info = build_model(folded=True)
    tensors = dict(model.state_dict())
    tensors["trunk.0.weight"] = tensors["trunk.0.weight"].clone(memory_format=torch.contiguous_format)
    flip(tensors["trunk.0.weight"], place=20)
    with pytest.raises(ArtifactError, match=r"'trunk\.0\.weight' is not what was published: of filter 1 "):
        prove(tensors, info, Origins().find(info))


def test_what_is_left_out_behind_the_end_is_not_asked_for(monkeypatch):
    register(monkeypatch)
    model, info = build_model(without=("6", "7", "8"))
    assert [layer.layer for layer in proof_of(model, info).layers] == ["trunk.0", "trunk.3"]


@pytest.mark.parametrize("kept", [{"trunk.1": [0]}, {"trunk.0": []}, {"trunk.0": [0, 0]}, {"trunk.0": [8]}])
def test_channels_that_cannot_be_kept_are_an_error(monkeypatch, kept):
    register(monkeypatch)
    _, info = build_model()
    with pytest.raises(ModelError):
        Origins().find(info).slices(kept)


def test_a_network_without_public_weights_is_an_error(monkeypatch):
    register(monkeypatch)
    model, _ = build_model()
    with pytest.raises(ArtifactError, match=r"only models of .*vgg16 have public weights"):
        Origins().find(describe(model, {}, backbone="monai:DenseNet121"))


def test_the_model_is_not_changed_by_the_proof(model_and_info):
    model, info = model_and_info
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proof_of(model, info)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["vgg16", "efficientnet_lite0"])
def test_the_digest_is_that_of_the_manifest(name):
    if not cache_path(name).exists():
        pytest.skip(f"needs: chanscale weights fetch {name}")
    preprocessing = BACKBONES[name].preprocessing().to_dict()
    info = ModelInfo(name, ("no", "yes"), {}, preprocessing, image_size=64, channels=1)
    [digest] = [status.digest for status in weights_status() if status.name == name]
    assert Origins().find(info).digest == digest


# --- the command


def run(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(monkeypatch, tmp_path):
    register(monkeypatch, "batch norm")
    return save_run(tmp_path / "run")


def test_the_command_says_what_is_from_the_checkpoint_and_what_not(folder, capsys):
    code, out, _ = run(capsys, "verify", folder)
    assert code == 0
    _, info = load_model(folder)
    filters = sum(info.widths.values())
    words = " ".join(out.split())
    assert (
        f"{filters} filters in 3 layers, and {filters} channels of 3 norms, are bit-exact slices of small"
        in words
    )
    assert "(drawn at random; digest " in words
    assert "scales, -" in words
    assert "the head, " in words


def test_the_command_gives_every_digest_as_json(folder, capsys):
    code, out, _ = run(capsys, "verify", folder, "--json")
    told = json.loads(out)
    assert code == 0
    assert [len(layer["kept"]) for layer in told["layers"] if layer["kind"] == "filters"] == list(
        load_model(folder)[1].widths.values()
    )
    for layer in told["layers"]:
        for digests in layer["tensors"].values():
            assert all(len(digest) == 64 for digest in digests.values())
    assert told["own"]["scales"]["count"] > 0
    assert told["own"]["folded"] is None
    assert told["delta"] is None


def test_the_command_fails_loudly_on_one_bit(folder, capsys):
    model, info = load_model(folder)
    flip(model.get_parameter("trunk.4.bias").data, mask=SIGN, place=1)
    save_model(model, info, folder / "model.safetensors")
    code, out, err = run(capsys, "verify", folder)
    place = info.kept["trunk.4"][1]
    assert code == 2
    assert out == ""
    assert (
        f"error: 'trunk.4.bias' is not what was published: of filter 1 ({place} in small), 1 of 1 weights"
        in err
    )
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_the_command_checks_a_delta_that_lies_beside(folder, tmp_path, capsys):
    save_delta(folder, folder / "delta.safetensors")
    code, out, _ = run(capsys, "verify", folder)
    assert code == 0
    assert "gives this very file" in out
    other = save_run(tmp_path / "other")
    assert not same_tensors(load_model(other)[0], load_model(folder)[0])
    code, _, err = run(capsys, "verify", other, "--delta", folder / "delta.safetensors")
    assert code == 2
    assert "is the delta of another model" in err


def test_the_command_says_so_of_a_folded_layer(monkeypatch, tmp_path, capsys):
    register(monkeypatch)
    code, out, _ = run(capsys, "verify", save_run(tmp_path / "run", folded=True))
    assert code == 0
    assert "trunk.0.weight, " in out
    assert "its filters are those of the checkpoint, summed over the colours" in out
    assert load_file(tmp_path / "run" / "model.safetensors")["trunk.0.weight"].shape[1] == 2


def test_the_command_refuses_a_network_without_public_weights(monkeypatch, tmp_path, capsys):
    register(monkeypatch)
    model, info = build_model()
    save_model(model, replace(info, backbone="monai:DenseNet121"), tmp_path / "model.safetensors")
    code, _, err = run(capsys, "verify", tmp_path)
    assert code == 2
    assert "error: only models of efficientnet_lite0, small, vgg16 have public weights" in err


# --- a graph


def write_graph(path, tensors):
    """Write a graph of convolutions in a row, a weight and a bias for each."""
    names = [f"t{index}" for index in range(len(tensors))]
    stored = [onnx.numpy_helper.from_array(t.numpy(), name) for t, name in zip(tensors, names, strict=True)]
    nodes = [
        onnx.helper.make_node("Conv", [f"x{i}", *names[i : i + 2]], [f"x{i + 2}"])
        for i in range(0, len(names), 2)
    ]
    ends = onnx.helper.make_tensor_value_info(f"x{len(names)}", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [], [ends], stored)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def merged_tensors(folder):
    """Return the weight and the bias of each convolution, each filter times its scale, as a graph stores them."""
    merged = merge_scales(load_model(folder)[0])
    convs = [module for module in merged.modules() if isinstance(module, nn.Conv2d)]
    return [tensor.detach().contiguous().clone() for conv in convs for tensor in (conv.weight, conv.bias)]


@pytest.fixture
def plain_run(monkeypatch, tmp_path):
    register(monkeypatch)
    return save_run(tmp_path / "run")


def test_a_graph_of_the_same_convolutions_is_proven(plain_run, tmp_path, capsys):
    graph = write_graph(tmp_path / "m.onnx", merged_tensors(plain_run))
    code, out, _ = run(capsys, "verify", plain_run, "--onnx", graph)
    assert code == 0
    assert "its 3 convolutions are these filters times their scales, bit for bit" in out
    code, out, _ = run(capsys, "verify", plain_run, "--onnx", graph, "--json")
    assert json.loads(out)["onnx"] == {"file": str(graph), "convolutions": 3, "with_norm": 0}


def test_a_graph_with_the_norms_folded_in_is_proven(folder, tmp_path, capsys):
    merged = merge_scales(load_model(folder)[0])
    tensors = []
    for place in (0, 4, 8):
        conv, norm = merged.trunk[place], merged.trunk[place + 1]
        factor = norm.weight / torch.from_numpy(np.sqrt(norm.running_var.numpy() + norm.eps))
        bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
        tensors += [conv.weight * factor.view(-1, 1, 1, 1), (bias - norm.running_mean) * factor + norm.bias]
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    code, out, _ = run(capsys, "verify", folder, "--onnx", write_graph(tmp_path / "m.onnx", tensors))
    assert code == 0
    assert "its 3 convolutions are these filters times their scales (3 of them and the norm behind)" in out
    flip(tensors[2], place=5)
    code, _, err = run(capsys, "verify", folder, "--onnx", write_graph(tmp_path / "m.onnx", tensors))
    assert code == 2
    assert "'trunk.4.weight'" in err


@pytest.mark.parametrize("index", range(6))
def test_one_flipped_bit_in_a_graph_is_found_and_named(plain_run, tmp_path, capsys, index):
    tensors = merged_tensors(plain_run)
    flip(tensors[index], place=tensors[index].numel() - 1)
    code, _, err = run(capsys, "verify", plain_run, "--onnx", write_graph(tmp_path / "m.onnx", tensors))
    layer, leaf = f"trunk.{3 * (index // 2)}", ("weight", "bias")[index % 2]
    assert code == 2
    assert f"of filter {len(tensors[index]) - 1} of '{layer}.{leaf}', 1 of " in err


def test_a_graph_without_scales_is_not_the_network(plain_run, tmp_path, capsys):
    model, _ = load_model(plain_run)
    frozen = [
        model.trunk[place].get_parameter(leaf).data.contiguous()
        for place in (0, 3, 6)
        for leaf in ("weight", "bias")
    ]
    code, _, err = run(capsys, "verify", plain_run, "--onnx", write_graph(tmp_path / "m.onnx", frozen))
    assert code == 2
    assert "are not the slice times its scale" in err


def test_a_graph_of_another_network_is_an_error(plain_run, tmp_path, capsys):
    tensors = merged_tensors(plain_run)
    for wrong, words in (
        (tensors[:4], "Got 2 instead"),
        ([*tensors[:4], tensors[4][1:], tensors[5]], "export it again"),
    ):
        code, _, err = run(capsys, "verify", plain_run, "--onnx", write_graph(tmp_path / "m.onnx", wrong))
        assert code == 2
        assert words in err


def hide_behind_a_name(graph, filters):
    """Another tensor of the same name: ONNX Runtime takes the first."""
    stored = list(graph.initializer)
    del graph.initializer[:]
    graph.initializer.extend([filters, *stored])


def hide_in_another_operator(graph, filters):
    """The true convolution feeds nothing, and a fused one with other filters stands in its place."""
    filters.name = "other"
    graph.initializer.append(filters)
    graph.node.append(graph.node[-1])
    true, live = graph.node[-2:]
    true.output[0] = "nowhere"
    live.op_type, live.domain, live.input[1] = "FusedConv", "com.microsoft", "other"


def hide_behind_an_input(graph, filters):
    graph.input.append(onnx.helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, filters.dims))


def hide_in_a_file(graph, _):
    onnx.external_data_helper.set_external_data(graph.initializer[0], "filters.bin")
    graph.initializer[0].ClearField("raw_data")


def hide_behind_an_output(graph, _):
    graph.node.append(onnx.helper.make_node("Identity", ["x0"], ["t0"]))


def hide_in_a_branch(graph, _):
    branch = onnx.helper.make_graph([graph.node[-1]], "branch", [], [])
    graph.node.append(onnx.helper.make_node("If", ["x0"], ["y"], then_branch=branch, else_branch=branch))


def hide_in_whole_numbers(graph, _):
    graph.node.append(onnx.helper.make_node("ConvInteger", ["x0", "t0"], ["y"]))


def hide_in_a_sparse_tensor(graph, filters):
    graph.sparse_initializer.add(values=filters, dims=filters.dims)


@pytest.mark.parametrize(
    ("hide", "said"),
    [
        (hide_behind_a_name, "'t0' is there 2 times"),
        (hide_behind_an_input, "'t0' is there 2 times"),
        (hide_behind_an_output, "'t0' is there 2 times"),
        (hide_in_another_operator, "it has the operator com.microsoft:FusedConv"),
        (hide_in_whole_numbers, "it has the operator ConvInteger"),
        (hide_in_a_branch, "If has a graph of its own"),
        (hide_in_a_file, "'t0' lies in another file"),
        (hide_in_a_sparse_tensor, "it has sparse tensors"),
    ],
)
def test_a_graph_that_could_compute_with_other_filters_is_refused(plain_run, tmp_path, capsys, hide, said):
    path = write_graph(tmp_path / "m.onnx", merged_tensors(plain_run))
    model = onnx.load(path)
    first = onnx.numpy_helper.to_array(model.graph.initializer[0])
    hide(model.graph, onnx.numpy_helper.from_array(-first, "t0"))
    path.write_bytes(model.SerializeToString())
    code, _, err = run(capsys, "verify", plain_run, "--onnx", path)
    assert code == 2
    assert said in err


def test_a_graph_with_functions_of_its_own_is_refused(plain_run, tmp_path, capsys):
    path = write_graph(tmp_path / "m.onnx", merged_tensors(plain_run))
    model = onnx.load(path)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(onnx.helper.make_function("", "Conv", ["x"], ["y"], [node], model.opset_import))
    path.write_bytes(model.SerializeToString())
    code, _, err = run(capsys, "verify", plain_run, "--onnx", path)
    assert code == 2
    assert "it has functions of its own" in err


def test_a_convolution_that_reaches_no_output_does_not_count(plain_run, tmp_path, capsys):
    path = write_graph(tmp_path / "m.onnx", merged_tensors(plain_run))
    model = onnx.load(path)
    # Inputs and outputs that are left out have no name, which joins nothing.
    last, model.graph.output[0].name = model.graph.output[0].name, "clipped"
    model.graph.node.append(onnx.helper.make_node("Dropout", [last], ["unused", ""]))
    model.graph.node.append(onnx.helper.make_node("Clip", ["x4", "", ""], ["clipped"]))
    path.write_bytes(model.SerializeToString())
    code, _, err = run(capsys, "verify", plain_run, "--onnx", path)
    assert code == 2
    assert "Got 2 instead" in err


@pytest.mark.parametrize("trunk", TRUNKS)
def test_what_is_exported_is_proven(monkeypatch, tmp_path, trunk):
    pytest.importorskip("onnxruntime", reason="needs: pip install 'chanscale[export]'")
    register(monkeypatch, trunk)
    folder = save_run(tmp_path / "run", folded=trunk == "plain")
    model, _ = load_model(folder)
    proof = prove_graph(export_run(folder).path, model)
    assert proof.convolutions == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert (proof.with_norm > 0) == (trunk != "plain")


@pytest.mark.parametrize("content", [None, b"no graph at all"])
def test_what_is_no_graph_is_an_error(plain_run, tmp_path, capsys, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    code, _, err = run(capsys, "verify", plain_run, "--onnx", path)
    assert code == 2
    assert "is no ONNX graph" in err
