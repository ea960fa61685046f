"""The laws on a GPU, where one is there; CHANSCALE_ACCELERATOR=cpu runs the same tests without one."""

import copy
import os

import numpy as np
import pytest
import torch

from chanscale import FitConfig, scale_and_select
from chanscale.attaching import merge_scales
from chanscale.checkpoint import load_checkpoint, save_checkpoint
from chanscale.ensemble import load_predictor
from chanscale.evaluation import evaluate, predict
from chanscale.group_scales import scale_parameters
from chanscale.modes import device_of
from chanscale.pruning import mask_channels, prune_channels
from chanscale.training import fit
from networks import (
    NETWORKS,
    attach,
    build,
    inputs,
    know_groups,
    relative_difference,
    require_slices,
    set_scales,
    widths_of,
)
from tiny_fits import SPLITS, tiny_classifier, tiny_config, tiny_images

ACCELERATOR = os.environ.get("CHANSCALE_ACCELERATOR", "cuda" if torch.cuda.is_available() else "")
ROUNDING = 1e-5
"""Of the largest output, in fp32 without TF32: another order of the same sums than on a CPU."""

DATA = tiny_images()
every_network = pytest.mark.parametrize("name", NETWORKS)

pytestmark = pytest.mark.skipif(
    not ACCELERATOR, reason="needs a GPU that torch can use (torch.cuda.is_available())"
)


@pytest.fixture(autouse=True)
def _no_tf32():
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@every_network
@torch.no_grad()
def test_attached_equals_the_original_there_and_on_the_cpu(name):
    original, x = build(name), inputs(name)
    there, x_there = copy.deepcopy(original).to(ACCELERATOR), x.to(ACCELERATOR)
    attached = attach(there, x_there)
    assert {p.device.type for p in scale_parameters(attached).values()} == {ACCELERATOR}
    assert torch.equal(attached(x_there), there(x_there))
    assert relative_difference(attached(x_there).cpu(), original(x)) < ROUNDING


@every_network
@torch.no_grad()
def test_pruned_equals_masked_and_merged_equals_scaled_there(name):
    x = inputs(name).to(ACCELERATOR)
    scaled = attach(build(name)).to(ACCELERATOR)
    selection = set_scales(scaled)
    pruned, masked = prune_channels(scaled, selection), mask_channels(scaled, selection)
    assert device_of(pruned).type == ACCELERATOR
    assert selection.widths == widths_of(pruned) != widths_of(scaled)
    assert relative_difference(pruned(x), masked(x)) < ROUNDING
    assert relative_difference(merge_scales(pruned)(x), pruned(x)) < ROUNDING


def test_a_fit_there_keeps_slices_meets_the_budget_and_says_on_the_cpu_what_it_says_there():
    model = tiny_classifier()
    best = fit(model, DATA, SPLITS, tiny_config(device=ACCELERATOR))
    assert device_of(best.model).type == ACCELERATOR
    require_slices(copy.deepcopy(best.model).cpu(), model, best.kept)
    assert best.row["parameters_removed"] >= tiny_config().budget
    there, labels = predict(best.model, DATA, SPLITS.validation)
    here, same = predict(copy.deepcopy(best.model).cpu(), DATA, SPLITS.validation)
    assert np.array_equal(labels, same)
    assert np.abs(there - here).max() < 1e-4


def test_a_fit_that_was_stopped_goes_on_there(tmp_path):
    config, states = tiny_config(device=ACCELERATOR), []
    path = tmp_path / "checkpoint.safetensors"

    def stop(state):
        states.append(state.epoch)
        if state.epoch == 2:
            save_checkpoint(state, {}, path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_classifier(), DATA, SPLITS, config, save=stop)
    whole = tiny_classifier()
    know_groups(whole, DATA.batch([0, 1])[0])
    state, _ = load_checkpoint(path, config, whole=whole)
    best = fit(tiny_classifier(), DATA, SPLITS, config, state=state)
    undisturbed = fit(tiny_classifier(), DATA, SPLITS, config)
    assert state.epoch == config.scale_epochs + config.refine_epochs
    # Sums by atomic additions come in any order: bits may differ, the answers do not by much.
    gone_on, never_left = (predict(b.model, DATA, SPLITS.validation)[0] for b in (best, undisturbed))
    assert np.abs(gone_on - never_left).max() < 0.05


def test_the_whole_command_there_in_the_precision_that_it_finds(tmp_path):
    config = FitConfig(
        **tiny_config(device=ACCELERATOR).model_dump() | {"precision": "auto", "test": 0.2, "depth": "auto"}
    )
    run = scale_and_select(tiny_classifier().trunk, DATA.images, config=config, out=tmp_path / "run")
    assert device_of(run.model).type == ACCELERATOR
    assert run.metrics["parameters"]["removed"] >= config.budget
    here = evaluate(load_predictor(tmp_path / "run")[0], DATA)  # from its file, on the CPU
    there = evaluate(run.model, DATA)
    assert np.abs(here.probabilities - there.probabilities).max() < 1e-4
    assert (tmp_path / "run" / "report.html").exists()
