import csv
import io

import pytest
from PIL import Image
from rich.console import Console

from chanscale.report import describe_run, draw_accuracy_size, draw_channels, write_history, write_plots
from chanscale.wording import percent, shorten, size_on_disk

VGG16 = dict(
    zip(
        [f"trunk.features.{index}" for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)],
        [64, 64, 128, 128, 256, 256, 256, *6 * [512]],
        strict=True,
    )
)
KEPT = {name: max(4, width // (1 + place)) for place, (name, width) in enumerate(VGG16.items())}
TRUNK = 14_714_688


def row(epoch, phase, parameters, auc):
    return {
        "epoch": epoch, "stage": 0, "phase": phase, "train_loss": 0.5, "validation_loss": 0.6,
        "validation_auc": auc, "parameters": parameters, "parameters_removed": 1 - parameters / TRUNK,
        "widths": KEPT, "removal_change": None, "seconds": 1.5,
    }  # fmt: skip


HISTORY = [
    row(0, "scale", TRUNK, 0.80), row(1, "scale", 2_000_000, 0.84), row(2, "scale", 529_488, 0.83),
    row(3, "refine", 529_488, 0.91), row(4, "refine", 529_488, 0.90),
]  # fmt: skip


def figure(value):
    return {"value": value, "low": value - 0.04, "high": value + 0.03}


def metrics(**changes):
    whole = {
        "auc": figure(0.911), "accuracy": figure(0.83), "n": 120, "patients": 104,
        "parameters": {
            "trunk": TRUNK, "kept": 529_488, "removed": 1 - 529_488 / TRUNK, "full": 138_357_544,
            "removed_of_full": 1 - 529_488 / 138_357_544, "head": 5,
        },
        "macs": {"trunk": 3_841_000_000, "kept": 463_000_000, "removed": 0.88},
        "bytes": {"trunk": 4 * TRUNK, "model": 2_131_000},
        "groups": {"prunable": 13, "protected": {}},
        "depth": {"layer": None, "without": [], "aucs": {}},
        "before": {"auc": figure(0.842), "accuracy": figure(0.77), "n": 120},
        "best_epoch": 3, "images": {"train": 390, "validation": 90, "test": 120, "skipped": 0},
    }  # fmt: skip
    return whole | changes


def printed(table, width=80):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def line_of(text, title):
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(title))


# --- the table


def test_the_table_shows_both_networks_and_the_change():
    text = printed(describe_run(metrics()))
    assert line_of(text, "trunk parameters") == "trunk parameters 14,714,688 529,488 27.8x fewer"
    assert line_of(text, "MACs") == "MACs per image 3.84 G 463 M 8.3x fewer"
    assert line_of(text, "size") == "size on disk 58.9 MB 2.13 MB 27.6x smaller"
    assert line_of(text, "AUC") == "AUC 0.842 [0.80, 0.87] 0.911 [0.87, 0.94] +0.069"
    assert line_of(text, "accuracy") == "accuracy 0.770 [0.73, 0.80] 0.830 [0.79, 0.86] +0.060"
    assert "96.4 % of the trunk's parameters removed (99.6 % of the full network's)" in text
    assert "120 test images of 104 patients" in text


def test_names_of_labels_are_text_and_no_markup():
    several = {name: {"auc": figure(0.9)} for name in ("spot [cm]", "odd [/b]", "[red]x")}
    text = " ".join(printed(describe_run(metrics(labels=several))).split())
    assert "AUC by label: spot [cm] 0.90, odd [/b] 0.90, [red]x 0.90" in text


def test_the_table_fits_80_columns():
    text = printed(describe_run(metrics()), width=80)
    # Were a cell too wide, it would go on in a line that has no title.
    assert "0.911 [0.87, 0.94]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_groups_that_were_left_whole_are_told():
    protected = {"conv1": "it has one channel", "conv2": "a grouped convolution"}
    text = printed(describe_run(metrics(groups={"prunable": 11, "protected": protected})))
    assert "2 of 13 channel groups left whole" in text
    assert "left whole" not in printed(describe_run(metrics()))


def test_where_the_trunk_ends_is_told_with_what_a_linear_head_reads_there():
    aucs = {"features.18": 0.9214, "the end": 0.8749}
    depth = {"layer": "features.18", "without": ["features.19"], "aucs": aucs}
    text = " ".join(printed(describe_run(metrics(depth=depth)), width=80).split())
    assert (
        "The trunk ends behind features.18: a linear head reads AUC 0.921 there, 0.875 at its own end" in text
    )
    asked_for = printed(describe_run(metrics(depth=depth | {"aucs": {}})))
    assert "The trunk ends behind features.18." in asked_for
    assert "ends behind" not in printed(describe_run(metrics()))


def test_patients_are_spoken_of_only_where_any_is_known():
    whole = metrics()
    del whole["patients"]
    text = " ".join(printed(describe_run(whole)).split())
    assert "120 test images; in brackets" in text
    assert "patients" not in text


def test_without_test_images_the_table_has_no_figures():
    whole = metrics(n=0, before={"n": 0})
    del whole["auc"], whole["accuracy"], whole["patients"]
    text = printed(describe_run(whole))
    assert "trunk parameters" in text
    assert "AUC" not in text
    assert "test images" not in text


def test_a_run_without_folder_or_published_network_has_neither_row():
    whole = metrics(bytes={"trunk": 4 * TRUNK})
    whole["parameters"] = whole["parameters"] | {"full": None, "removed_of_full": None}
    text = printed(describe_run(whole))
    assert "size on disk" not in text
    assert "full network" not in text


def test_a_figure_that_is_not_defined_is_shown_as_such():
    nowhere = {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    assert "nan" in line_of(printed(describe_run(metrics(auc=nowhere))), "AUC")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (99_960, "100 k"), (999_600, "1.00 M"), (TRUNK, "14.7 M")],
)
def test_large_numbers_keep_three_digits(number, text):
    assert shorten(number) == text


def test_units_follow_the_number():
    assert (size_on_disk(12), size_on_disk(58_858_752), percent(0.9640)) == ("12 B", "58.9 MB", "96.4 %")


# --- the history


def read_history(folder):
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


def test_the_history_has_a_row_for_each_epoch_and_a_column_for_each_width(tmp_path):
    write_history(tmp_path / "history.csv", HISTORY)
    rows = read_history(tmp_path)
    assert len(rows) == len(HISTORY)
    for got, wanted in zip(rows, HISTORY, strict=True):
        assert float(got["validation_auc"]) == wanted["validation_auc"]
        assert {name: int(got[f"width:{name}"]) for name in KEPT} == wanted["widths"]
        assert got["removal_change"] == ""
    assert "widths" not in rows[0]


def test_a_history_keeps_every_digit(tmp_path):
    write_history(tmp_path / "history.csv", [row(0, "scale", TRUNK, 0.1 + 0.2)])
    [got] = read_history(tmp_path)
    assert float(got["validation_auc"]) == 0.1 + 0.2


# --- the pictures


def test_both_plots_are_whole_small_images_and_nothing_else_is_left(tmp_path):
    paths = write_plots(tmp_path, HISTORY, VGG16, KEPT, metrics())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy_size.png", "channels.png"]
    for path in paths:
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            image.load()
            assert image.width > 900
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # more than an empty sheet


def test_the_same_run_gives_the_same_plots(tmp_path):
    first = [path.read_bytes() for path in write_plots(tmp_path, HISTORY, VGG16, KEPT, metrics())]
    assert first == [path.read_bytes() for path in write_plots(tmp_path, HISTORY, VGG16, KEPT, metrics())]


def labels_of(axes):
    return axes.get_legend_handles_labels()[1]


def test_the_curve_marks_the_chosen_epoch_and_the_baseline():
    [axes] = draw_accuracy_size(HISTORY, metrics()).axes
    assert "chosen: AUC 0.910, 96.4 % removed" in labels_of(axes)
    assert "frozen network + linear head: test AUC 0.842" in labels_of(axes)
    star = next(item for item in axes.collections if item.get_label().startswith("chosen"))
    assert star.get_offsets().tolist() == [[529_488, 0.91]]


def test_the_baseline_is_that_of_the_validation_images_where_it_is_known():
    before = {"auc": figure(0.842), "validation_auc": 0.851, "n": 120}
    [axes] = draw_accuracy_size(HISTORY, metrics(before=before)).axes
    assert "frozen network + linear head: validation AUC 0.851" in labels_of(axes)


def test_the_curve_needs_no_baseline_and_no_refinement():
    [axes] = draw_accuracy_size(HISTORY[:3], metrics(before={"n": 0}, n=0, best_epoch=2)).axes
    assert not any("frozen" in label for label in labels_of(axes))


def test_the_axes_hold_every_epoch():
    [axes] = draw_accuracy_size(HISTORY, metrics()).axes
    low, high = axes.get_xlim()
    assert low < 529_488
    assert high > TRUNK


def ticks_of(figure):
    [axes] = figure.axes
    return [label.get_text() for label in axes.get_xticklabels()]


def test_layers_of_vgg16_bear_their_published_names():
    ticks = ticks_of(draw_channels(VGG16, KEPT))
    assert ticks[:3] == ["conv1_1", "conv1_2", "conv2_1"]
    assert ticks[-1] == "conv5_3"


def test_layers_of_another_network_bear_their_module_names():
    assert ticks_of(
        draw_channels({"trunk.stem": 8, "trunk.body": 16}, {"trunk.stem": 2, "trunk.body": 3})
    ) == [
        "stem",
        "body",
    ]


def test_bars_add_up_to_the_channels_of_the_layer():
    [axes] = draw_channels(VGG16, KEPT).axes
    kept, removed = axes.containers
    assert [bar.get_height() for bar in kept] == list(KEPT.values())
    assert [bar.get_y() + bar.get_height() for bar in removed] == list(VGG16.values())
    assert [text.get_text() for text in axes.texts] == [str(width) for width in KEPT.values()]


def test_layers_behind_the_end_of_the_trunk_are_drawn_as_removed():
    early = dict(list(KEPT.items())[:8])
    kept, removed = draw_channels(VGG16, early).axes[0].containers
    assert [bar.get_height() for bar in kept] == [*early.values(), 0, 0, 0, 0, 0]
    assert [bar.get_height() for bar in removed][8:] == [512] * 5
