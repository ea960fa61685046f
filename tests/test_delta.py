"""What is rebuilt from a delta and the public weights is the model file, byte for byte; anything else is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import networks
import tiny_backbone
from chanscale import BACKBONES, cli, restore_model, save_delta, save_model, scale_and_select
from chanscale.artifact import METADATA, ModelInfo, load_model, pack_tensors
from chanscale.attaching import attach_scales
from chanscale.backbones import load_backbone
from chanscale.channels import carry_groups
from chanscale.classifier import assemble, to_channels_last
from chanscale.coupling import couple_channels
from chanscale.delta import FORMAT, KEPT, Restorer, read_delta
from chanscale.errors import ArtifactError, DigestError, WeightsError
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from chanscale.weights import cache_path
from networks import same_tensors, set_scales
from public_networks import NAME, TRUNKS, build_model, register, save_run
from tiny_fits import tiny_config, tiny_images

BOUND = 16_000
"""Bytes of the delta of a VGG16 with two fifths of its channels left: more than 95 % removal leaves."""


def make_delta(tmp_path: Path, **options) -> tuple[Path, Path]:
    """Return the run folder of a model, and its delta."""
    run = save_run(tmp_path / "run", **options)
    return run, save_delta(run, tmp_path / "delta.safetensors")


def model_bytes(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def metadata_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])


def rewrite(path, change):
    """Write a delta anew, its tensors and its metadata changed."""
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors, metadata)
    save_file(tensors, path, {METADATA: json.dumps(metadata)})


def error_of(path, kind=ArtifactError):
    with pytest.raises(kind) as caught:
        restore_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CASES = {
    **{name: (name, {}) for name in TRUNKS},
    "an early end": ("plain", {"without": ("6", "7", "8")}),
    "folded for grey images": ("batch norm", {"folded": True}),
}


@pytest.fixture(params=CASES)
def made(request, monkeypatch, tmp_path):
    """A run folder and its delta, of each kind of network."""
    trunk, options = CASES[request.param]
    register(monkeypatch, trunk)
    return make_delta(tmp_path, **options)


def test_restored_equals_saved_bit_for_bit(made):
    run, delta = made
    saved, told = load_model(run)
    restored, info = restore_model(delta)
    x = torch.rand(3, info.channels, 32, 32)
    assert info == told
    assert same_tensors(restored, saved)
    assert torch.equal(restored(x), saved(x))
    assert not restored.training
    assert not any(parameter.requires_grad for parameter in restored.parameters())


def test_the_model_file_is_rebuilt_byte_for_byte(made):
    run, delta = made
    assert Restorer().rebuild(delta) == model_bytes(run)


def test_no_slice_of_the_checkpoint_is_stored(made):
    run, delta = made
    own = read_delta(delta).tensors
    folded = ["trunk.0.weight"] if load_model(run)[1].preprocessing["folded"] else []
    assert sorted(name for name in own if name.startswith("trunk.") and "channel_scale" not in name) == folded
    assert any("channel_scale" in name for name in own)
    assert {name for name in own if name.startswith("head.")} == {
        "head.linear.weight", "head.linear.bias", "head.mean", "head.variance",
    }  # fmt: skip


def test_a_tensor_that_is_no_slice_is_stored_as_it_is(monkeypatch, tmp_path):
    register(monkeypatch)
    model, info = build_model()
    with torch.no_grad():
        model.trunk[3].bias[1] += 1
    save_model(model, info, tmp_path / "model.safetensors")
    delta = save_delta(tmp_path, tmp_path / "delta.safetensors")
    assert torch.equal(read_delta(delta).tensors["trunk.3.bias"], model.trunk[3].bias)
    assert Restorer().rebuild(delta) == model_bytes(tmp_path)


def test_a_model_of_which_nothing_was_removed_is_rebuilt(monkeypatch, tmp_path):
    register(monkeypatch)
    whole = networks.attach(networks.build_classifier(load_backbone(NAME)))
    kept = {name: torch.arange(width) for name, width in networks.widths_of(whole).items()}
    save_model(whole, networks.describe(whole, kept, backbone=NAME), tmp_path / "model.safetensors")
    delta = save_delta(tmp_path, tmp_path / "delta.safetensors")
    assert Restorer().rebuild(delta) == model_bytes(tmp_path)


def test_a_run_that_was_trained_is_rebuilt(monkeypatch, tmp_path):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    config = tiny_config(test=0, depth="features.5", fold_grey=True)
    run = scale_and_select("tiny", tiny_images().images, config=config, out=tmp_path / "run")
    delta = save_delta(run.folder, tmp_path / "delta.safetensors")
    assert Restorer().rebuild(delta) == model_bytes(run.folder)
    assert same_tensors(restore_model(delta)[0], run.model)


def test_equal_models_give_equal_deltas(monkeypatch, tmp_path):
    register(monkeypatch)
    run, delta = make_delta(tmp_path)
    assert save_delta(run, tmp_path / "again.safetensors").read_bytes() == delta.read_bytes()
    assert save_delta(str(run)) == run / "delta.safetensors"
    assert (run / "delta.safetensors").read_bytes() == delta.read_bytes()


@pytest.mark.parametrize("name", ["vgg16", "efficientnet_lite0"])
def test_a_published_network_is_rebuilt_from_a_few_kilobytes(tmp_path, name):
    if not cache_path(name).exists():
        pytest.skip(f"needs: chanscale weights fetch {name}")
    example = torch.rand(1, 3, 64, 64)
    model = assemble(BACKBONES[name].preprocessing(), load_backbone(name), example, classes=("no", "yes"))
    groups = couple_channels(model, example)
    scaled = attach_scales(carry_groups(model, groups), groups)
    kept = set_scales(scaled, zeros=0.6).kept
    pruned = to_channels_last(prune_channels(scaled, ChannelSelection(kept)))
    info = replace(networks.describe(pruned, kept, backbone=name), image_size=64)
    save_model(pruned, info, tmp_path / "model.safetensors")
    delta = save_delta(tmp_path, tmp_path / "delta.safetensors")
    assert delta.stat().st_size < (BOUND if name == "vgg16" else 10 * BOUND)
    restored, _ = restore_model(delta)
    assert torch.equal(restored(example), load_model(tmp_path)[0](example))


# --- many deltas


def retell_scales(model, info, folder, *, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "channel_scale" in name:
                parameter.mul_(factor)
    folder.mkdir()
    save_model(model, info, folder / "model.safetensors")
    return save_delta(folder, folder / "delta.safetensors")


def test_twenty_deltas_hold_the_network_once(monkeypatch, tmp_path):
    register(monkeypatch, "batch norm")
    whole = networks.attach(networks.build_classifier(load_backbone(NAME)))
    kept = {name: torch.arange(width) for name, width in networks.widths_of(whole).items()}
    kept["trunk.8"] = torch.tensor([0, 3, 4])  # the layers in front of it are left whole
    model = prune_channels(whole, ChannelSelection({"trunk.8": kept["trunk.8"]}))
    info = networks.describe(model, kept, backbone=NAME)
    deltas = [retell_scales(model, info, tmp_path / str(i), factor=1 + 0.1 * i) for i in range(20)]
    reads = []
    published = load_backbone(NAME).state_dict()
    monkeypatch.setattr(
        "chanscale.weights.resolve_weights", lambda name, **_: reads.append(name) or dict(published)
    )
    restorer = Restorer()
    models = [restorer.restore(delta)[0] for delta in deltas]
    assert reads == [NAME]
    held = restorer.origins.find(info).whole.state_dict()
    for name in ("trunk.0.weight", "trunk.4.weight", "trunk.1.running_mean", "trunk.5.bias"):
        assert {model.state_dict()[name].data_ptr() for model in models} == {held[name].data_ptr()}
    scales = [model.state_dict()["trunk.9.channel_scale.weight"] for model in models]
    assert len({scale.data_ptr() for scale in scales}) == 20
    assert not torch.equal(scales[0], scales[1])


def test_restoring_changes_nothing_of_the_network_that_is_held(monkeypatch, tmp_path):
    register(monkeypatch)
    _, delta = make_delta(tmp_path)
    restorer = Restorer()
    _, info = restorer.restore(delta)
    held = restorer.origins.find(info).whole.state_dict()
    before = {name: tensor.clone() for name, tensor in held.items()}
    restorer.restore(delta)[0](torch.rand(2, 3, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.items())


# --- what is refused


def test_scales_that_were_changed_are_refused(monkeypatch, tmp_path):
    register(monkeypatch)
    _, delta = make_delta(tmp_path)
    rewrite(delta, lambda tensors, _: tensors["trunk.0.channel_scale.weight"][0].mul_(1.001))
    assert "does not give the model file that it stands for" in error_of(delta)


def test_a_delta_for_other_weights_is_refused(monkeypatch, tmp_path):
    register(monkeypatch)
    _, delta = make_delta(tmp_path)
    register(monkeypatch, seed=2)
    assert f"is for other weights of {NAME}" in error_of(delta, DigestError)


TAMPERINGS = {
    "another version": lambda _, told: told.update(format="chanscale-delta/2"),
    "no format": lambda _, told: told.pop("format"),
    "a model of another version": lambda _, told: told["model"].update(format="chanscale-model/99"),
    "no model": lambda _, told: told.update(model=None),
    "a model without info": lambda _, told: told["model"].pop("info"),
    "info that is a number": lambda _, told: told["model"].update(info=3),
    "another network": lambda _, told: told["model"]["info"].update(backbone="vgg99"),
    "another public network": lambda _, told: told["model"]["info"].update(backbone="other"),
    "a class more": lambda _, told: told["model"]["info"]["classes"].append("third"),
    "other classes": lambda _, told: told["model"]["info"].update(classes=["yes", "no"]),
    "a module that is not there": lambda _, told: told["model"]["info"].update(without=["99"]),
    "all is left out": lambda _, told: told["model"]["info"].update(without=[""]),
    "a digest that is none": lambda _, told: told.update(sha256="0"),
    "no digest": lambda _, told: told.pop("weights"),
    "another digest": lambda _, told: told.update(sha256="0" * 64),
    "a group that is not there": lambda _, told: told["widths"].update({"trunk.99": told["widths"].pop("trunk.6")}),
    "a group less": lambda _, told: told["widths"].pop("trunk.6"),
    "a group of another width": lambda _, told: told["widths"].update({"trunk.0": 16, "trunk.3": 8}),
    "a group of no width": lambda _, told: told["widths"].update({"trunk.0": 0}),
    "a group of negative width": lambda _, told: told["widths"].update({"trunk.0": -8}),
    "a group of enormous width": lambda _, told: told["widths"].update({"trunk.0": 10**15}),
    "no bits": lambda tensors, _: tensors.pop(KEPT),
    "too many bits": lambda tensors, _: tensors.update({KEPT: torch.full((99,), 255, dtype=torch.uint8)}),
    "a bit behind the last": lambda tensors, _: tensors[KEPT][-1:].bitwise_or_(1),
    "other bits": lambda tensors, _: tensors[KEPT][:1].bitwise_xor_(128),
    "no channel": lambda tensors, _: tensors[KEPT].zero_(),
    "bits of another type": lambda tensors, _: tensors.update({KEPT: tensors[KEPT].float()}),
    "a scale is missing": lambda tensors, _: tensors.pop("trunk.0.channel_scale.weight"),
    "a tensor more": lambda tensors, _: tensors.update({"trunk.9.weight": torch.ones(3)}),
    "the head is missing": lambda tensors, _: tensors.pop("head.linear.weight"),
    "another shape": lambda tensors, _: tensors.update({"head.mean": torch.ones(99)}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_delta_that_was_tampered_with_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, name):
    register(monkeypatch)
    monkeypatch.setitem(BACKBONES, "other", replace(BACKBONES[NAME], name="other"))
    _, delta = make_delta(tmp_path)
    rewrite(delta, TAMPERINGS[name])
    error_of(delta)
    before = sorted(tmp_path.iterdir())
    assert cli.run(["restore", str(delta), "--out", str(tmp_path / "new")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sorted(tmp_path.iterdir()) == before


MISFITS = {
    "a tensor more": lambda tensors: tensors.update({"trunk.1.weight": torch.ones(3)}),
    "a width that fits no other": lambda tensors: tensors.update({"head.mean": torch.ones(99)}),
    "a tensor is missing": lambda tensors: tensors.pop("head.mean"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_load_has_no_delta(monkeypatch, tmp_path, name):
    register(monkeypatch)
    run = save_run(tmp_path / "run")
    file = run / "model.safetensors"
    tensors, metadata = load_file(file), metadata_of(file)
    MISFITS[name](tensors)
    save_file(tensors, file, {METADATA: json.dumps(metadata)})
    with pytest.raises(ArtifactError, match="does not fit 'small'"):
        save_delta(run, tmp_path / "delta.safetensors")
    assert not (tmp_path / "delta.safetensors").exists()


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_load_is_refused_though_its_digest_is_right(monkeypatch, tmp_path, name):
    register(monkeypatch)
    _, path = make_delta(tmp_path)
    rewrite(path, lambda tensors, _: MISFITS[name](tensors))
    delta = read_delta(path)
    slices = Restorer().origins.find(delta.info).slices(delta.info.kept)
    digest = hashlib.sha256(pack_tensors({**slices, **delta.tensors}, delta.metadata)).hexdigest()
    rewrite(path, lambda _, told: told.update(sha256=digest))
    assert "does not fit 'small'" in error_of(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_delta_is_an_error(monkeypatch, tmp_path, share):
    register(monkeypatch)
    _, delta = make_delta(tmp_path)
    content = delta.read_bytes()
    delta.write_bytes(content[: int(share * len(content))])
    assert "not a whole safetensors file" in error_of(delta)


def test_a_model_is_no_delta_and_a_delta_no_model(monkeypatch, tmp_path):
    register(monkeypatch)
    run, delta = make_delta(tmp_path)
    assert "it is no delta" in error_of(run / "model.safetensors")
    assert "there is no delta at" in error_of(run)
    with pytest.raises(ArtifactError, match="it is no chanscale model"):
        load_model(delta)


def test_a_network_without_public_weights_has_no_delta(monkeypatch, tmp_path):
    register(monkeypatch)
    model, info = build_model()
    save_model(model, replace(info, backbone="timm:resnet18"), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"have public weights .* Got one of 'timm:resnet18'"):
        save_delta(tmp_path, tmp_path / "delta.safetensors")
    assert not (tmp_path / "delta.safetensors").exists()


def test_weights_that_are_not_there_are_an_error(monkeypatch, tmp_path):
    preprocessing = BACKBONES["vgg16"].preprocessing().to_dict()
    info = ModelInfo("vgg16", ("no", "yes"), {}, preprocessing, image_size=64, channels=1)
    register(monkeypatch)
    model, _ = build_model()
    save_model(model, info, tmp_path / "model.safetensors")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="nowhere"):
        save_delta(tmp_path, tmp_path / "d.safetensors", weights=tmp_path / "nowhere.safetensors")


# --- the command


def restore(capsys, *arguments):
    code = cli.run(["restore", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("out", ["new", "deep/new", "new.safetensors"])
def test_the_command_rebuilds_the_model_file(monkeypatch, tmp_path, capsys, out):
    register(monkeypatch)
    run, delta = make_delta(tmp_path)
    code, told, _ = restore(capsys, delta, "--out", tmp_path / out)
    file = tmp_path / out if out.endswith(".safetensors") else tmp_path / out / "model.safetensors"
    assert code == 0
    assert file.read_bytes() == model_bytes(run)
    assert metadata_of(delta)["sha256"] in "".join(told.split())


def test_the_command_fills_a_run_folder_and_writes_over_nothing(monkeypatch, tmp_path, capsys):
    register(monkeypatch)
    run = save_run(tmp_path / "run")
    save_delta(run, run / "delta.safetensors")
    content = model_bytes(run)
    code, _, err = restore(capsys, run, "--out", run)
    assert code == 2
    assert "exists already" in err
    (run / "model.safetensors").unlink()
    assert restore(capsys, run, "--out", run)[0] == 0
    assert model_bytes(run) == content


def test_the_file_says_what_it_is_and_holds_no_indices(monkeypatch, tmp_path):
    register(monkeypatch)
    _, delta = make_delta(tmp_path)
    told = metadata_of(delta)
    assert told["format"] == FORMAT
    assert set(told) == {"format", "chanscale", "weights", "sha256", "widths", "model"}
    assert told["model"]["info"]["kept"] is None
    assert told["widths"] == {"trunk.0": 8, "trunk.3": 16, "trunk.6": 12}
    bits = load_file(delta)[KEPT]
    assert bits.dtype == torch.uint8
    assert len(bits) == 5
