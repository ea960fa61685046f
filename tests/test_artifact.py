import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from chanscale.artifact import FORMAT, METADATA, load_model, save_model
from chanscale.backbones import BACKBONES
from chanscale.classifier import to_channels_last
from chanscale.config import LARGEST_SIDE
from chanscale.errors import ArtifactError
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from networks import (
    attach,
    build_classifier,
    describe,
    grouped_trunk,
    images,
    renew_statistics,
    same_tensors,
    set_scales,
)
from tiny_backbone import TinyTrunk, register


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """A pruned model of a registered backbone, and its file."""
    register(monkeypatch.setitem, monkeypatch.setattr)
    model = attach(build_classifier(TinyTrunk()))
    kept = dict(set_scales(model).kept)
    # As training leaves it; in another memory layout, sums are taken in another order.
    model = to_channels_last(renew_statistics(prune_channels(model, ChannelSelection(kept))))
    return model, save_model(model, describe(model, kept, backbone="tiny"), tmp_path / "model.safetensors")


def metadata_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])


def write(path, tensors, metadata):
    save_file(tensors, path, {METADATA: json.dumps(metadata)})


def error_of(path, **options):
    with pytest.raises(ArtifactError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_reloaded_equals_saved_bit_for_bit(saved):
    model, path = saved
    loaded, info = load_model(path)
    x = images(side=32)
    assert same_tensors(loaded, model)
    assert torch.equal(loaded(x), model(x))
    assert info == describe(
        model, {name: torch.tensor(kept) for name, kept in info.kept.items()}, backbone="tiny"
    )
    assert loaded.classes == model.classes
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_run_folder_stands_for_its_model(saved):
    model, path = saved
    assert same_tensors(load_model(path.parent)[0], model)


@torch.no_grad()
def test_a_new_process_computes_the_same_bits(saved, tmp_path):
    model, path = saved
    x = images(side=32)
    save_file({"x": x, "y": model(x)}, tmp_path / "xy.safetensors")
    program = f"""
import sys, torch
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import tiny_backbone
from pathlib import Path
from chanscale import load_model
from safetensors.torch import load_file
tiny_backbone.register()
torch.set_num_threads({torch.get_num_threads()})
xy = load_file({str(tmp_path / "xy.safetensors")!r})
with torch.no_grad():
    print(torch.equal(load_model(Path({str(path)!r}))[0](xy["x"]), xy["y"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_model_that_was_saved_whole_loads(tmp_path):
    trunk = TinyTrunk()
    model = attach(build_classifier(trunk))
    whole = {"trunk.features.0": torch.arange(8), "trunk.features.3": torch.arange(16)}
    path = save_model(model, describe(model, whole), tmp_path / "m.safetensors")
    assert same_tensors(load_model(path, trunk=trunk)[0], model)


def test_loading_touches_neither_the_trunk_nor_the_random_numbers(tmp_path):
    trunk = TinyTrunk()
    model = attach(build_classifier(trunk))
    kept = dict(set_scales(model).kept)
    path = save_model(
        prune_channels(model, ChannelSelection(kept)), describe(model, kept), tmp_path / "m.safetensors"
    )
    before, state = {k: v.clone() for k, v in trunk.state_dict().items()}, torch.get_rng_state()
    load_model(path, trunk=trunk)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_the_file_holds_no_pickle_and_says_what_it_is(saved):
    _, path = saved
    metadata = metadata_of(path)
    assert metadata["format"] == FORMAT
    assert set(metadata["info"]) >= {"backbone", "classes", "kept", "preprocessing", "image_size"}
    assert len(load_file(path)) > 0


def test_nothing_but_the_file_is_written(saved):
    _, path = saved
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_a_missing_file_is_an_error(tmp_path):
    assert "there is no model at" in error_of(tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="pass a run folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model, only text\n" * 20, b"\x80\x04\x95pickle", b"{}"])
def test_a_foreign_file_is_an_error(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "not a whole safetensors file" in error_of(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error(saved, share):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "not a whole safetensors file" in error_of(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {METADATA: '{"format": "chanscale-model/99"}'}])
def test_another_format_is_an_error(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata)
    assert "it is no chanscale model, or one of another version" in error_of(path)


def retell(path, change):
    """Write the file anew, with the info in its metadata changed."""
    metadata, tensors = metadata_of(path), load_file(path)
    change(metadata["info"])
    write(path, tensors, metadata)


TAMPERINGS = {
    "a field is missing": lambda info: info.pop("kept"),
    "an image size that is no number": lambda info: info.update(image_size="large"),
    "images without channels": lambda info: info.update(channels=0),
    "another backbone": lambda info: info.update(backbone="vgg16"),
    "an unknown backbone": lambda info: info.update(backbone="vgg99"),
    "no backbone": lambda info: info.update(backbone=None),
    "a layer that is not there": lambda info: info["kept"].update(nowhere=[0]),
    "a channel too few": lambda info: info["kept"]["trunk.features.0"].pop(),
    "a channel that is not there": lambda info: info["kept"]["trunk.features.0"].append(99),
    "a channel twice": lambda info: info["kept"]["trunk.features.0"].__setitem__(slice(2), [1, 1]),
    "no channel": lambda info: info["kept"]["trunk.features.0"].clear(),
    "channels that are no numbers": lambda info: info["kept"].update({"trunk.features.0": ["a", "b"]}),
    "channels that are fractions": lambda info: info["kept"].update({"trunk.features.0": [0.5, 1.5]}),
    "channels that are one number": lambda info: info["kept"].update({"trunk.features.0": 3}),
    "channels in a list": lambda info: info.update(kept=[1, 2]),
    "a class more": lambda info: info["classes"].append("third"),
    "one class": lambda info: info["classes"].pop(),
    "no classes": lambda info: info.update(classes=None),
    "preprocessing that cannot be": lambda info: info["preprocessing"].update(std=[0, 0, 0]),
    "preprocessing of another kind": lambda info: info["preprocessing"].update(order="grb"),
    "preprocessing without a mean": lambda info: info["preprocessing"].pop("mean"),
    "no preprocessing": lambda info: info.update(preprocessing=None),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_metadata_that_were_tampered_with_are_an_error(saved, name):
    _, path = saved
    retell(path, TAMPERINGS[name])
    error_of(path)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"image_size": LARGEST_SIDE + 1}, "image_size: Input should be less than or equal to 2048"),
        ({"image_size": 646, "space": {}}, "a cube of 646 voxels a side is too large"),
        ({"channels": 10**9}, "channels: Input should be less than or equal to 3"),
    ],
)
def test_no_memory_is_taken_for_images_that_no_run_could_have(saved, monkeypatch, claim, said):
    _, path = saved
    retell(path, lambda info: info.update(claim))
    monkeypatch.setattr("chanscale.artifact.rebuild", lambda *_, **__: pytest.fail("it was built"))
    assert said in error_of(path)


@pytest.mark.parametrize(
    "name",
    ["timm:hf-hub:any/body", "timm:hf_hub:any/body", "timm:HF-HUB:any/body", "timm:local-dir:net",
     "transformers:any/body", "transformers:~nobody-of-this-name/net", "transformers:{folder}"],
)  # fmt: skip
def test_a_file_has_no_hub_asked_and_no_folder_opened(saved, monkeypatch, name):
    _, path = saved
    monkeypatch.setattr("chanscale.originals.build_network", lambda *_, **__: pytest.fail("it was built"))
    retell(path, lambda info: info.update(backbone=name.format(folder=path.parent)))
    assert "a folder or a hub says what" in error_of(path)
    assert "pass that network as `trunk`" in error_of(path)


def test_a_channel_of_a_grouped_network_is_several_of_a_layer(tmp_path):
    trunk = grouped_trunk()
    model = attach(build_classifier(trunk))
    kept = dict(set_scales(model).kept)
    pruned = prune_channels(model, ChannelSelection(kept))
    path = save_model(pruned, describe(pruned, kept), tmp_path / "m.safetensors")
    loaded, info = load_model(path, trunk=trunk)
    assert len(info.kept["trunk.0"]) * 2 == loaded.trunk[0].out_channels == 16
    for wrong in (info.kept["trunk.0"][1:], [*info.kept["trunk.0"][1:], 12]):
        retell(path, lambda told, wrong=wrong: told["kept"].update({"trunk.0": wrong}))
        assert "has 16 of 24 channels" in error_of(path, trunk=trunk)


def test_metadata_that_are_no_json_are_an_error(saved):
    _, path = saved
    save_file(load_file(path), path, {METADATA: "{"})
    assert "not a whole safetensors file" in error_of(path)


def test_equal_models_give_equal_bytes(saved, tmp_path):
    model, path = saved
    _, info = load_model(path)
    again = [save_model(model, info, tmp_path / f"{i}.safetensors").read_bytes() for i in range(5)]
    assert set(again) == {path.read_bytes()}


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "a width that fits no other"])
def test_tensors_that_do_not_fit_are_an_error(saved, change):
    _, path = saved
    tensors, metadata = load_file(path), metadata_of(path)
    if change == "missing":
        del tensors["head.mean"]
    elif change == "extra":
        tensors["head.more"] = torch.zeros(1)
    elif change == "shape":
        tensors["head.mean"] = torch.zeros(99)
    else:
        name = "trunk.features.3.weight"
        tensors[name] = tensors[name][:, 1:].contiguous()
    write(path, tensors, metadata)
    assert "does not fit 'tiny'" in error_of(path)


def test_another_trunk_than_the_original_is_an_error(saved):
    _, path = saved
    assert "tiny" in BACKBONES
    error_of(path, trunk=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
