import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from chanscale.artifact import METADATA
from chanscale.checkpoint import load_checkpoint, save_checkpoint
from chanscale.classifier import classification_loss, to_channels_last
from chanscale.config import FitConfig
from chanscale.errors import ArtifactError
from chanscale.removal import remove_channels
from chanscale.state import Best, TrainingState, make_optimizer
from networks import (
    TRUNKS,
    attach,
    build,
    build_classifier,
    images,
    renew_statistics,
    same_tensors,
    set_scales,
    widths_of,
)

CONFIG = FitConfig()
NOTES = {"seconds": 1.5, "before": {"auc": float("nan")}}


def step(state, seed=0):
    """Train `state` by one batch, which depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 3, 32, 32, generator=generator)
    labels = torch.arange(6) % 2
    torch.manual_seed(seed)  # for a dropout in the trunk
    classification_loss(state.model.train()(x), labels).mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.epoch += 1


def train(trunk):
    """Return a state in the midst of training: stepped, pruned, stepped, with a best and a candidate."""
    model = to_channels_last(attach(build_classifier(trunk)))
    kept = {name: torch.arange(width) for name, width in widths_of(model).items()}
    state = TrainingState(model, make_optimizer(model, CONFIG), kept, scale_lr=0.02)
    step(state)
    best = Best(renew_statistics(attach(build_classifier(trunk))), dict(kept), {"validation_auc": 0.5})
    selection = set_scales(renew_statistics(model))
    removal = remove_channels(model, state.optimizer, kept, selection, example=images(2, side=32))
    state.model, state.kept = removal.model, removal.kept
    state.optimizer = make_optimizer(state.model, CONFIG)
    removal.restore(state.optimizer)
    step(state, 1)
    state.history = [{"epoch": 0, "removal_change": None, "validation_auc": 0.1 + 0.2}]
    state.candidate, state.best = Best(removal.model, dict(removal.kept), state.history[0]), best
    return state


@pytest.fixture
def saved(tmp_path):
    trunk = build("plain")
    state = train(trunk)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(state, NOTES, path)
    return state, trunk, path


def same_indices(got, wanted):
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_everything_comes_back(saved):
    state, trunk, path = saved
    loaded, notes = load_checkpoint(path, CONFIG, whole=build_classifier(trunk))
    assert same_tensors(loaded.model, state.model)
    assert same_indices(loaded.kept, state.kept)
    assert (loaded.epoch, loaded.scale_lr, loaded.history) == (state.epoch, state.scale_lr, state.history)
    for got, wanted in ((loaded.candidate, state.candidate), (loaded.best, state.best)):
        assert same_tensors(got.model, wanted.model)
        assert same_indices(got.kept, wanted.kept)
        assert got.row == wanted.row
    assert repr(notes) == repr(NOTES)
    assert [p.requires_grad for p in loaded.model.parameters()] == [
        p.requires_grad for p in state.model.parameters()
    ]


def test_a_fresh_state_has_neither_best_nor_candidate(saved):
    state, trunk, path = saved
    state.best = state.candidate = None
    save_checkpoint(state, {}, path)
    loaded, _ = load_checkpoint(path, CONFIG, whole=build_classifier(trunk))
    assert loaded.best is None
    assert loaded.candidate is None


@pytest.mark.parametrize("name", TRUNKS)
def test_the_next_steps_are_the_same_bit_for_bit(name, tmp_path):
    trunk, path = build(name), tmp_path / "checkpoint.safetensors"
    state = train(trunk)
    save_checkpoint(state, {}, path)
    loaded, _ = load_checkpoint(path, CONFIG, whole=build_classifier(trunk))
    for seed in (2, 3):
        step(state, seed)
        step(loaded, seed)
        assert same_tensors(loaded.model, state.model)
    for ours, theirs in zip(loaded.model.parameters(), state.model.parameters(), strict=True):
        got, wanted = loaded.optimizer.state[ours], state.optimizer.state[theirs]
        assert same_indices(got, wanted)


def test_loading_unpickles_nothing(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a checkpoint must not be unpickled")

    _, trunk, path = saved
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    load_checkpoint(path, CONFIG, whole=build_classifier(trunk))


def error_of(path, trunk):
    with pytest.raises(ArtifactError, match="delete its folder and fit again") as caught:
        load_checkpoint(path, CONFIG, whole=build_classifier(trunk))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "foreign", "no metadata"])
def test_a_damaged_file_is_an_error(saved, damage):
    _, trunk, path = saved
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "no metadata":
        save_file(load_file(path), path)
    else:
        path.write_bytes(
            {"empty": b"", "truncated": content[: len(content) // 2], "foreign": b"text " * 99}[damage]
        )
    error_of(path, trunk)


@pytest.mark.parametrize("change", ["story", "kept", "moment", "model"])
def test_a_file_whose_parts_do_not_fit_is_an_error(saved, change):
    _, trunk, path = saved
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    told = json.loads(metadata[METADATA])
    tensors, story = load_file(path), told["story"]
    if change == "story":
        del story["kept"]
    elif change == "kept":
        story["kept"]["trunk.0"].pop()
    elif change == "moment":
        del tensors["moments.0.exp_avg"]
    else:
        del tensors["model.head.mean"]
    save_file(tensors, path, {METADATA: json.dumps(told)})
    error_of(path, trunk)


def test_a_file_of_another_network_is_an_error(saved):
    _, _, path = saved
    error_of(path, build("batch norm"))
