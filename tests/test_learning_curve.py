"""What more images would bring: the law, its uncertainty, and the command."""

import json

import numpy as np
import pytest
from PIL import Image

from chanscale import cli
from chanscale.comparison.cells import Cell, write_cell
from chanscale.comparison.grid import GridFolder, Plan
from chanscale.comparison.learning_curve import Law, Point, find_points, fit_curve, fit_law
from chanscale.comparison.table import make_rows
from chanscale.config import FitConfig
from chanscale.errors import ConfigError
from test_cli import error_of, loaded_by_help, words
from test_compare_folds import make_images
from test_compare_grid import make_result

SIZES = (25, 50, 100, 200, 400)
LAW = Law(0.95, 1.2, 0.6)
CONFIG = FitConfig(precision="32-true", group_pattern="^(\\d+)_")


def draw_points(law=LAW, *, sizes=SIZES, cells=8, noise=0.01, seed=0):
    """Points that a law with normal noise gives; the noise of a size has mean 0 where `noise` is 0."""
    rng = np.random.default_rng(seed)
    return tuple(Point(n, tuple(law.at(n) + noise * rng.normal(size=cells))) for n in sizes)


@pytest.fixture
def grid(tmp_path):
    """A grid whose cells have AUCs of the law, as a folder."""
    folder = GridFolder(tmp_path / "grid")
    plan = Plan(("head", "chanscale"), (25, 50, 100, None), 3, (0, 1, 2), (0,), CONFIG)
    with folder.working():
        folder.begin(plan, make_images())
    rng = np.random.default_rng(0)
    for cell in plan.cells:
        result = make_result(cell)
        images = cell.size or 200 + cell.fold
        result["images"]["train"] = images
        write_cell(folder.cells, result | {"auc": float(LAW.at(images) + 0.005 * rng.normal())})
    return folder


# --- the law


def test_a_curve_without_noise_is_found_again():
    law = fit_law(draw_points(noise=0))
    assert (law.a, law.b, law.c) == pytest.approx((LAW.a, LAW.b, LAW.c), rel=0.01)


@pytest.mark.parametrize("law", [LAW, Law(0.9, 2.0, 0.9), Law(1.0, 0.6, 0.3)])
def test_a_curve_drawn_from_the_law_is_recovered_within_its_interval(law):
    curve = fit_curve(draw_points(law, seed=1), resamples=200)
    for times in (1, 2, 4):
        found = curve.at(times * curve.most)
        assert found.low <= law.at(times * curve.most) <= found.high
        assert found.low <= found.value <= found.high
        assert found.high - found.low < 0.15


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(40):
        curve = fit_curve(draw_points(cells=4, noise=0.02, seed=seed), resamples=200)
        found = curve.at(2 * curve.most)
        held += found.low <= LAW.at(2 * curve.most) <= found.high
    assert held >= 32  # of 40. With few cells, and bounds on the law, it is nearer to 85 to 90 % than to 95 %


def test_farther_off_the_interval_is_wider():
    curve = fit_curve(draw_points(), resamples=200)
    widths = [figure.high - figure.low for figure in (curve.gain(times) for times in (1.5, 2, 4))]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize("slope", [0.0, -0.02])
def test_a_curve_that_is_flat_or_falls_promises_nothing(slope):
    points = tuple(
        Point(n, tuple(0.8 + slope * i + d for d in (-0.003, 0.0, 0.003))) for i, n in enumerate(SIZES)
    )
    curve = fit_curve(points, resamples=100)
    assert curve.is_flat
    assert curve.law.at(1000) == curve.law.at(25) == pytest.approx(np.mean([p.mean for p in points]))
    assert curve.gain(4).value == pytest.approx(0, abs=0.004)
    assert all(law.b >= 0 <= law.c for law in curve.draws)


def test_no_law_leaves_what_an_auc_can_be():
    points = draw_points(Law(1.0, 1.0, 0.4), noise=0.05, cells=3)
    curve = fit_curve(points, resamples=100)
    assert all(law.a <= 1 and law.b >= 0 and law.c >= 0 for law in curve.draws)
    assert curve.at(1e9).high <= 1


def test_a_size_that_is_surer_counts_more():
    rising = draw_points(noise=0)
    sure, unsure = ((rising[-1].mean + 0.05 + d, rising[-1].mean + 0.05 - d) for d in (0.001, 0.3))
    others = tuple(Point(p.images, (p.mean - 0.001, p.mean + 0.001)) for p in rising[:-1])
    miss = [abs(fit_law((*others, Point(400, aucs))).at(400) - np.mean(aucs)) for aucs in (sure, unsure)]
    assert miss[0] < miss[1]


def test_cells_that_all_agree_have_a_curve_without_a_width():
    curve = fit_curve(draw_points(noise=0), resamples=20)
    assert curve.gain(2).high - curve.gain(2).low < 1e-6
    assert curve.gain(2).value == pytest.approx(LAW.at(800) - LAW.at(400), abs=1e-3)


def test_it_says_how_far_it_would_have_missed_the_largest_size():
    assert fit_curve(draw_points(noise=0), resamples=5).missed == pytest.approx(0, abs=1e-3)
    broken = (*draw_points(noise=0)[:-1], Point(400, (0.7, 0.7)))
    assert fit_curve(broken, resamples=5).missed > 0.15
    assert fit_curve(draw_points(sizes=(25, 50, 100)), resamples=5).missed is None


# --- the grid


def test_points_are_the_chosen_cells_by_how_many_images_they_had(grid):
    rows = make_rows(grid.results()[0], ["head", "chanscale"])
    points = find_points(rows, "chanscale")
    assert [point.images for point in points] == [25, 50, 100, 201]
    assert [len(point.aucs) for point in points] == [3] * 4
    with pytest.raises(ConfigError, match=r"must be one that the grid has, head, chanscale\. Got 'full'"):
        find_points(rows, "full")


def test_a_size_of_one_cell_is_refused(grid):
    for fold in (1, 2):
        (grid.cells / f"{Cell('head', 50, fold, 0).name}.json").unlink()
    with pytest.raises(ConfigError, match="needs 2 cells of each size, and with 50 training images"):
        find_points(make_rows(grid.results()[0], ["head"]), "head")


def test_fewer_than_three_sizes_are_one_line(grid, capsys):
    for path in grid.cells.glob("chanscale-n[15]*.json"):
        path.unlink()
    line = error_of(capsys, ["learning-curve", grid.out])
    assert "needs cells of 3 numbers of training images, and the grid has 2" in line
    assert "--sizes" in line


# --- the command


def test_the_command_says_what_more_would_bring(grid, tmp_path, capsys):
    picture = tmp_path / "curve.png"
    assert cli.run(["learning-curve", str(grid.out), "--out", str(picture)]) == 0
    out, err = words(capsys)
    assert "402 (2 times)" in out
    assert "804 (4 times)" in out
    assert "AUC(n) = 0." in out
    assert "a few sizes cannot show that" in " ".join(out.split())
    assert err == f"wrote {picture}\n"
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 500
    assert cli.run(["learning-curve", str(grid.out), "--method", "head", "--json"]) == 0
    told = json.loads(words(capsys)[0])
    assert [size["images"] for size in told["sizes"]] == [25, 50, 100, 201]
    assert [one["images"] for one in told["forecasts"]] == [402, 804]
    assert all(one["gain"]["low"] >= 0 for one in told["forecasts"])
    assert told["law"]["a"]["low"] <= told["law"]["a"]["high"] <= 1


def test_a_picture_takes_the_place_of_no_file_but_its_own(grid, tmp_path, capsys):
    for path in (grid.out / "accuracy_size.png", tmp_path / "learning_curve.png"):
        path.write_text("another's")
        assert "exists already" in error_of(capsys, ["learning-curve", grid.out, "--out", path])
        assert path.read_text() == "another's"
    assert "is not called .png" in error_of(capsys, ["learning-curve", grid.out, "--out", tmp_path / "a.pdf"])
    for _ in range(2):
        assert cli.run(["learning-curve", str(grid.out), "--out", str(grid.out / "learning_curve.png")]) == 0


def test_it_says_that_a_gain_is_no_difference_of_two_rows(grid, capsys):
    assert cli.run(["learning-curve", str(grid.out)]) == 0
    assert "A gain is the median" in words(capsys)[0]
    curve = fit_curve(find_points(make_rows(grid.results()[0], ["chanscale"]), "chanscale"))
    rises = [law.at(2 * curve.most) - law.at(curve.most) for law in curve.draws]
    assert curve.gain(2).value == pytest.approx(np.median(rises))
    assert any("medians do not subtract" in note for note in curve.to_dict()["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning-curve"], "Missing argument 'GRID'"),
        (["learning-curve", "nowhere"], "there is no grid at nowhere"),
        (["learning-curve", "nowhere", "--out", "no/curve.png"], "there is no folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_without_cells_is_one_line(grid, capsys):
    for path in grid.cells.iterdir():
        path.unlink()
    assert "no curve to fit" in error_of(capsys, ["learning-curve", grid.out])


@pytest.mark.parametrize("command", ["learning-curve", "cross-validate"])
def test_help_loads_nothing_heavy(command):
    assert loaded_by_help(command) == "[]"
