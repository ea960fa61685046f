"""How far runs that differ in their seed agree: laws of the measures, and the command on real runs."""

import json
import shutil

import numpy as np
import pytest

from chanscale import cli, measure_stability
from chanscale.config import FitConfig
from chanscale.errors import ConfigError
from chanscale.explain.stability import STABILITY, agree_on_channels, agree_on_maps, jaccard
from chanscale.files import to_json
from test_cli import error_of, words
from test_export import make_run

WIDTHS = {"a": 64, "b": 128}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the tiny backbone on the same images, with other seeds, and those images."""
    folder = tmp_path_factory.mktemp("runs")
    for first, data in make_run(folder / "one", "--depth=full"):
        second = folder / "two"
        code = cli.run(
            ["fit", str(data), f"--config={first / 'config.yaml'}", f"--out={second}", "--seed=5", "--json"]
        )
        assert code == 0
        yield first, second, data


def test_jaccard_is_what_is_shared_over_what_either_has():
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset("a"), frozenset("b")) == 0
    assert jaccard(frozenset(), frozenset()) == 1


def test_runs_that_keep_the_same_agree_and_runs_that_share_nothing_do_not():
    low, high = {"a": range(8), "b": range(16)}, {"a": range(8, 16), "b": range(16, 32)}
    assert agree_on_channels([low, low], WIDTHS).mean == 1.0
    assert agree_on_channels([low, high], WIDTHS).mean == 0.0
    three = agree_on_channels([low, low, high], WIDTHS)
    assert (three.mean, three.least, three.most) == (pytest.approx(1 / 3), 0.0, 1.0)


def test_the_same_number_in_another_layer_is_another_channel():
    assert agree_on_channels([{"a": [0, 1]}, {"b": [0, 1]}], WIDTHS).mean == 0.0


def test_random_channels_agree_as_chance_says():
    rng = np.random.default_rng(1)
    runs = [
        {name: rng.choice(width, width // 4, replace=False).tolist() for name, width in WIDTHS.items()}
        for _ in range(40)
    ]
    found = agree_on_channels(runs, WIDTHS)
    assert found.mean == pytest.approx(found.chance, abs=0.01)  # 780 pairs, each within some 0.03
    assert found.chance == pytest.approx(
        1 / 7, abs=0.01
    )  # a quarter of a quarter, of what is left of two quarters


def test_keeping_all_agrees_by_chance_too():
    everything = {name: range(width) for name, width in WIDTHS.items()}
    found = agree_on_channels([everything, everything], WIDTHS)
    assert found.mean == found.chance == 1.0


def test_maps_agree_whatever_their_unit_and_not_by_chance():
    maps = np.random.default_rng(0).normal(size=(30, 7, 7))
    same = agree_on_maps([maps, np.exp(2 * maps) + 5])  # any rising function keeps the ranks
    assert same.mean == pytest.approx(1.0)
    assert same.chance == pytest.approx(0.0, abs=0.05)
    assert agree_on_maps([maps, -maps]).mean == pytest.approx(-1.0)


def test_what_all_images_have_in_common_is_counted_as_chance():
    rng = np.random.default_rng(0)
    frame = np.linspace(0, 10, 49).reshape(7, 7)
    first, second = (frame + 0.1 * rng.normal(size=(20, 7, 7)) for _ in range(2))
    found = agree_on_maps([first, second])
    assert found.mean > 0.98
    assert found.mean == pytest.approx(found.chance, abs=0.01)


def test_a_flat_map_agrees_with_nothing():
    maps = np.random.default_rng(0).normal(size=(5, 4, 4))
    assert agree_on_maps([maps, np.ones((5, 4, 4))]).mean == 0.0


@pytest.mark.parametrize(
    "measure", [lambda: agree_on_channels([{}], WIDTHS), lambda: agree_on_maps([np.ones((3, 2, 2))])]
)
def test_one_run_cannot_agree(measure):
    with pytest.raises(ConfigError, match="wanted two runs or more to compare, got 1"):
        measure()


def test_maps_of_other_images_or_sizes_are_refused():
    with pytest.raises(ConfigError, match="at one size"):
        agree_on_maps([np.ones((3, 2, 2)), np.ones((3, 4, 4))])


def copy_as(run, folder, seed):
    """Copy a run, and let the copy say that it has another seed."""
    shutil.copytree(run, folder)
    config = FitConfig.read(folder / "config.yaml").model_copy(update={"seed": seed})
    (folder / "config.yaml").write_text(config.to_yaml())


def test_a_run_agrees_with_its_own_copy(runs, tmp_path):
    first, _, data = runs
    copy_as(first, tmp_path / "copy", seed=7)
    found = measure_stability([first, tmp_path / "copy"], data)
    assert found.channels.mean == 1.0
    assert found.maps.mean == pytest.approx(1.0)
    assert (found.answers, found.spread) == (1.0, pytest.approx(0.0))
    assert found.seen == 0
    assert found.maps.chance < 1.0


def test_the_command_writes_what_it_says_into_each_run(runs, capsys):
    first, second, data = runs
    assert cli.run(["stability", str(first), str(second), f"--images={data}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((first / STABILITY).read_text()) == json.loads((second / STABILITY).read_text())
    assert said["runs"] == 2
    assert 0 <= said["channels"]["mean"] <= 1
    assert -1 <= said["maps"]["mean"] <= 1
    assert to_json(measure_stability([first, second], data).to_dict()) == to_json(said)


def test_the_command_says_which_images_another_run_has_seen(runs, capsys):
    first, second, data = runs
    assert cli.run(["stability", str(first), str(second), f"--images={data}"]) == 0
    out, err = words(capsys)
    assert "channels kept (Jaccard)" in out
    assert "trained on, or validated with, in another of the runs" in out + err  # another seed, another split


def test_one_run_or_none_is_one_line(runs, capsys, tmp_path):
    first, _, data = runs
    images = f"--images={data}"
    assert "wanted two runs or more" in error_of(capsys, ["stability", first, images])
    assert "wanted two runs or more" in error_of(capsys, ["stability", first, first, images])
    assert str(tmp_path / "nothing") in error_of(capsys, ["stability", first, tmp_path / "nothing", images])


def test_the_report_tells_it_and_says_when_it_is_not_known(runs, tmp_path, capsys):
    first, second, data = runs
    shutil.copytree(first, tmp_path / "bare")
    (tmp_path / "bare" / STABILITY).unlink(missing_ok=True)
    assert cli.run(["report", str(tmp_path / "bare"), f"--images={data}"]) == 0
    assert "has not been measured for this run" in (tmp_path / "bare" / "report.html").read_text()
    assert cli.run(["stability", str(tmp_path / "bare"), str(second), f"--images={data}"]) == 0
    assert cli.run(["report", str(tmp_path / "bare"), f"--images={data}"]) == 0
    page = (tmp_path / "bare" / "report.html").read_text()
    told = json.loads((tmp_path / "bare" / STABILITY).read_text())
    assert f"<td>{told['channels']['mean']:.2f}</td>" in page
    assert f"<td>{told['maps']['chance']:.2f}</td>" in page
    assert "has not been measured for this run" not in page


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"channels": 3}', '{"channels": {"mean": "<b>"}}', "[" * 100_000]
)
def test_a_damaged_file_is_one_line(runs, tmp_path, capsys, content):
    first, _, data = runs
    shutil.copytree(first, tmp_path / "run")
    (tmp_path / "run" / STABILITY).write_text(content)
    line = error_of(capsys, ["report", tmp_path / "run", f"--images={data}"])
    assert STABILITY in line
    assert "chanscale stability" in line


def test_runs_of_one_seed_such_as_two_folds_are_refused(runs, capsys, tmp_path):
    first, second, data = runs
    shutil.copytree(first, tmp_path / "fold")
    line = error_of(capsys, ["stability", first, second, tmp_path / "fold", f"--images={data}"])
    assert f"got seed=0 in {first} and {tmp_path / 'fold'}" in line


def test_runs_that_differ_in_more_than_the_seed_are_refused(runs, capsys, tmp_path):
    first, _, data = runs
    shutil.copytree(first, tmp_path / "other")
    config = (tmp_path / "other" / "config.yaml").read_text().replace("augment: true", "augment: false")
    (tmp_path / "other" / "config.yaml").write_text(config)
    line = error_of(capsys, ["stability", first, tmp_path / "other", f"--images={data}"])
    assert "differ in their seed alone" in line
    assert "augment" in line
    assert "3 are named" in error_of(
        capsys, ["stability", first, first, tmp_path / "other", f"--images={data}"]
    )
