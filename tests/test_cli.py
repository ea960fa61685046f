"""What a user of the command line meets; the network is tiny, and everything else is real."""

import csv
import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import tiny_backbone
from chanscale import __version__, cli, commands, demo, display, pipeline, run_images
from chanscale.artifact import load_model
from chanscale.backbones import BACKBONES
from chanscale.classifier import probabilities
from chanscale.config import FitConfig
from chanscale.data import ImageSet, open_images, phantoms, read_image
from chanscale.errors import TrainingError
from chanscale.progress import Watcher
from chanscale.schedule import plan_epochs
from networks import same_tensors
from test_report import metrics

OPTIONS = [
    "--backbone=tiny", "--image-size=32", "--budget=0.5", "--round-to=1", "--scale-epochs=2",
    "--refine-epochs=1", "--precision=32-true", "--group-pattern=^(\\d+)_", "--batch-size=8",
    "--micro-batch=8", "--workers=0", "--speed=off",
]  # fmt: skip
HEAVY = ("torch", "imagecodecs", "sklearn", "matplotlib", "lightning_fabric", "scipy")


def draw(folder: Path, patients: int = 24, classes: tuple[str, ...] = ("clear", "spot")) -> Path:
    """Write two images of each patient to a folder per class: noise, in the second with a bright spot."""
    rng = np.random.default_rng(3)
    for patient in range(patients):
        label = patient % len(classes)
        for film in range(2):
            pixels = rng.integers(0, 120, (32, 32), dtype=np.uint8)
            pixels[8:24, 8:24] += np.uint8(100 * label)
            path = folder / classes[label] / f"{patient:03}_{film}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def words(capsys) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def error_of(capsys, arguments) -> str:
    """Run a command that must fail; return its one line."""
    code = cli.run([str(argument) for argument in arguments])
    out, err = words(capsys)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1] == line
    return line


def files_below(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


def loaded_by_help(command: str, names: tuple[str, ...] = HEAVY) -> str:
    """Return which modules of these `names` a process holds that has shown the help of a command, as a list."""
    found = f"[name for name in {names!r} if name in sys.modules]"
    program = f"import sys, chanscale.cli as cli; cli.run([{command!r}, '--help']); print({found})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


# --- starting


@pytest.mark.parametrize("arguments", [None, [], ["--help"], ["fit", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    call = "pass" if arguments is None else f"chanscale.cli.run({arguments!r})"
    program = f"import sys, chanscale.cli; {call}; print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_no_arguments_show_the_commands(capsys):
    assert cli.run([]) == 0
    out, _ = words(capsys)
    assert all(name in out for name in ("fit", "evaluate", "predict", "weights", "phantom", "demo"))
    assert "not a medical device" in " ".join(out.split())


def test_the_list_of_commands_cuts_no_line_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.run(["--help"])
    assert "..." not in words(capsys)[0].partition("Commands:")[2]


def test_the_version_is_printed(capsys):
    assert cli.run(["--version"]) == 0
    assert words(capsys)[0] == f"chanscale {__version__}\n"


def test_python_m_runs_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "chanscale", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"chanscale {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["fit"], "Missing argument 'DATA'; see `chanscale fit --help`"),
        (["fit", "data"], "Missing option '--out'"),
        (["fit", "data", "--out", "run", "--nonsense", "1"], "No such option: --nonsense"),
        (["fit", "data", "--out", "run", "--seed", "one"], "Invalid value for '--seed'"),
        (["fit", "data", "--out", "run", "--penalty", "l3"], "'l3' is not one of 'proximal', 'gradient'"),
        (["fit", "data", "--out", "run", "--budget", "2"], "budget: Input should be less than 1."),
        (["fit", "data", "--out", "run", "--config", "no.yaml"], "cannot read the configuration no.yaml"),
        (["fit", "nowhere", "--out", "run"], "nowhere does not exist"),
        (["evaluate", "nowhere", "data"], "there is no model at nowhere"),
        (["predict", "nowhere", "image.png"], "there is no model at nowhere"),
        (["weights", "fetch", "resnet1"], "must be one of"),
        (["phantom", "out", "--size", "7"], "the size of a phantom must be"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    def fetch(name, *, progress):
        raise PermissionError(13, "Permission denied", "/cache/file")

    monkeypatch.setattr("chanscale.weights.fetch_weights", fetch)
    assert error_of(capsys, ["weights", "fetch"]) == "error: /cache/file: Permission denied"


def test_an_error_of_many_lines_becomes_one(monkeypatch, capsys):
    def fetch(name, *, progress):
        raise TrainingError("first\n  second")

    monkeypatch.setattr("chanscale.weights.fetch_weights", fetch)
    assert error_of(capsys, ["weights", "fetch"]) == "error: first second"


# --- the options of a fit


@pytest.fixture
def asked(monkeypatch):
    """Replaces the run by one that only notes what it was asked."""
    noted = SimpleNamespace(error=None, before_the_error=lambda: None)

    def scale_and_select(model, data, *, config, out, resume, watcher):
        vars(noted).update(model=model, data=data, config=config, out=out, resume=resume, watcher=watcher)
        if noted.error:
            noted.before_the_error()
            raise noted.error
        return SimpleNamespace(metrics=metrics(notice="Research software."), history=[], folder=out)

    monkeypatch.setattr(pipeline, "scale_and_select", scale_and_select)
    return noted


def fit(tmp_path, *arguments) -> int:
    if not (tmp_path / "data").exists():
        draw(tmp_path / "data", patients=4)
    return cli.run(["fit", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *arguments])


def test_without_options_a_fit_has_the_defaults(tmp_path, asked):
    assert fit(tmp_path) == 0
    assert asked.config == FitConfig()
    assert (asked.model, asked.data) == ("vgg16", tmp_path / "data")
    assert (asked.out, asked.resume) == (tmp_path / "run", False)


def other_value(name):
    """A value that an option may have and that is not its default, as text and as it is."""
    default = getattr(FitConfig(), name)
    special = {
        "group_pattern": "^(\\d+)_", "positive": "spot", "weights": Path("w.h5"), "cache_gib": 0.5,
        "tolerance": 0.01, "budget_of": "macs", "penalty": "gradient", "weigh_by": "macs",
        "precision": "32-true", "device": "cpu", "backbone": "other", "micro_batch": 4,
        "threshold": 0.05, "depth": "full", "sensitivity": 0.9, "coverage": 0.9, "frames": "all",
        "label_columns": "mass,effusion", "spacing": 1.5, "window": (-1000.0, 400.0), "workers": 3,
        "speed": "off",
    }  # fmt: skip
    if name in special:
        return special[name]
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else default / 2 or 0.0625


@pytest.mark.parametrize("name", sorted({*FitConfig.model_fields} - {"label_columns"}))  # which a table takes
def test_every_field_of_the_configuration_is_an_option(tmp_path, asked, name):
    option, value = name.replace("_", "-"), other_value(name)
    words = [f"--{'' if value else 'no-'}{option}"]
    if not isinstance(value, bool):
        words = [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    assert fit(tmp_path, *words) == 0
    assert asked.config == FitConfig(**{name: value})


def test_help_describes_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.run(["fit", "--help"])
    text = " ".join(words(capsys)[0].split())
    for name, field in FitConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert " ".join(field.description.split()) in text
    assert "[default: 0.95]" in text
    assert "<proximal|gradient>" in text
    assert "--augment / --no-augment" in text


def test_the_command_line_stands_over_the_file_and_the_file_over_the_defaults(tmp_path, asked):
    (tmp_path / "config.yaml").write_text("budget: 0.9\nseed: 5\naugment: false\n")
    # The seed on the command line is the default, and must win over the file all the same.
    assert fit(tmp_path, "--config", str(tmp_path / "config.yaml"), "--seed", "0", "--test", "0.25") == 0
    assert asked.config == FitConfig(budget=0.9, seed=0, augment=False, test=0.25)


def test_the_configuration_of_a_run_can_be_given_back(tmp_path, asked):
    wanted = FitConfig(budget=0.97, group_pattern="^(\\d+)_", tolerance=0.02, cache_gib=1.5)
    (tmp_path / "config.yaml").write_text(wanted.to_yaml())
    assert fit(tmp_path, "--config", str(tmp_path / "config.yaml")) == 0
    assert asked.config == wanted


def test_an_option_that_there_is_not_is_told_with_its_file_and_the_nearest(tmp_path, asked, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("bugdet: 0.5\nhead_lr: much\nseed: -1\n")
    arguments = ["fit", "data", "--out", tmp_path / "run", "--config", file, "--seed=-2"]
    line = error_of(capsys, arguments)
    assert f"{file}: there is no option `bugdet`; did you mean `budget`?" in line
    assert f"{file}: head_lr: Input should be a valid number" in line
    assert "; seed: Input should be greater" in line  # that of the command line
    file.write_text("qqq: 1\n")
    assert error_of(capsys, arguments[:-1]).endswith("there is no option `qqq`")


def test_contradictory_options_are_refused(tmp_path, capsys):
    draw(tmp_path / "data", patients=4)
    line = error_of(
        capsys, ["fit", tmp_path / "data", "--out", tmp_path / "run", "--validation", "0.5", "--test", "0.5"]
    )
    assert "validation + test must be below 0.9" in line


def test_a_fit_shows_the_table_the_folder_and_the_next_command(tmp_path, asked, capsys):
    assert fit(tmp_path) == 0
    out, _ = words(capsys)
    assert "14,714,688" in out
    assert f"Run folder: {tmp_path / 'run'}" in out
    assert f"predict {tmp_path / 'run'} IMAGE" in out
    assert out.rstrip().endswith("Research software.")


def test_json_of_a_fit_is_one_object_on_stdout(tmp_path, asked, capsys):
    assert fit(tmp_path, "--json") == 0
    told = json.loads(words(capsys)[0])
    assert told["run"] == str(tmp_path / "run")
    assert told["parameters"]["kept"] == 529_488


def test_patients_that_may_stand_on_two_sides_are_pointed_out(tmp_path, asked, capsys):
    fit(tmp_path)
    [line] = words(capsys)[1].splitlines()
    assert line.startswith("warning: ")
    assert line.endswith("add --group-pattern '^(\\d+)[_-]'")


def test_the_images_are_not_held_twice(tmp_path, asked):
    def image_sets():
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is ImageSet}

    def compare():
        asked.held = image_sets() - before

    before = image_sets()  # those of other tests
    asked.before_the_error, asked.error = compare, TrainingError("far enough")
    assert fit(tmp_path) == 2
    assert asked.held == set()


@pytest.mark.parametrize("out", ["data/run", "data", "data/clear/run", "link/run"])
def test_a_run_among_the_images_is_refused(tmp_path, monkeypatch, asked, capsys, out):
    draw(tmp_path / "data", patients=4)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert f"--out {out} lies in the images' folder data" in error_of(capsys, ["fit", "data", "--out", out])


@pytest.mark.parametrize("out", [".", "./", ""])
def test_phantoms_go_beside_a_run_that_is_named_without_a_name(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert demo.QUICK.folder_beside(Path(out)) == tmp_path / "phantoms-120-64px"


def test_nothing_is_pointed_out_where_the_pattern_is_given(tmp_path, asked, capsys):
    fit(tmp_path, "--group-pattern", "^(\\d+)_")
    assert words(capsys)[1] == ""


def leave_unfinished_run(tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "config.yaml").write_text(FitConfig().to_yaml())


@pytest.mark.parametrize(("given", "times"), [([], 1), (["--group-pattern=^(\\d+)_"], 0)])
def test_images_are_listed_beforehand_only_where_no_pattern_finds_patients(
    tmp_path, asked, monkeypatch, given, times
):
    listed = []
    monkeypatch.setattr(
        run_images, "open_images", lambda *given, **how: listed.append(given) or open_images(*given, **how)
    )
    assert fit(tmp_path, *given) == 0  # what fits is patched, and lists none
    assert len(listed) == times


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_interrupt_says_how_to_go_on(tmp_path, asked, capsys, resume):
    if resume:
        leave_unfinished_run(tmp_path)
    else:
        asked.before_the_error = lambda: leave_unfinished_run(tmp_path)
    asked.error = KeyboardInterrupt()
    assert fit(tmp_path, *resume) == 130
    line = words(capsys)[1].splitlines()[-1]
    assert line.startswith("interrupted; go on")
    assert line.endswith(f"fit {tmp_path / 'data'} --out {tmp_path / 'run'} --resume")
    assert asked.resume == bool(resume)


def test_an_interrupt_before_anything_is_written_does_not_speak_of_going_on(tmp_path, asked, capsys):
    asked.error = KeyboardInterrupt()
    assert fit(tmp_path) == 130
    assert words(capsys)[1].splitlines()[-1] == "interrupted; nothing half-written is left"


def test_a_breakdown_in_a_resumed_run_leaves_what_was_there(tmp_path, asked, capsys):
    leave_unfinished_run(tmp_path)
    asked.error = TrainingError("the loss became nan")
    assert fit(tmp_path, "--resume") == 2
    assert (tmp_path / "run.partial" / "config.yaml").exists()


@pytest.mark.parametrize(("level", "said"), [(logging.NOTSET, False), (logging.INFO, True)])
def test_the_libraries_below_say_nothing_of_themselves_unless_asked(level, said):
    program = (
        f"import logging; logging.getLogger('lightning_fabric.utilities.rank_zero').setLevel({level})\n"
        "from chanscale import FitConfig; from chanscale.devices import make_fabric\n"
        "make_fabric(FitConfig(device='cpu', precision='bf16-mixed'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("bfloat16" in done.stderr) == said


def test_an_interrupt_elsewhere_does_not_speak_of_going_on(monkeypatch, capsys):
    def fetch(name, *, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr("chanscale.weights.fetch_weights", fetch)
    assert cli.run(["weights", "fetch"]) == 130
    assert words(capsys)[1] == "interrupted; nothing half-written is left\n"


# --- inspection


def test_a_network_is_inspected(capsys):
    assert cli.run(["inspect", "vgg16", "--size", "32", "--json"]) == 0
    report = json.loads(words(capsys)[0])
    assert [group["width"] for group in report["groups"]] == [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert all(group["protected"] is None for group in report["groups"])
    assert report["prunable"] == 1


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("vgg17", "must be one of efficientnet_lite0, vgg16"),
        ("keras:VGG16", "'keras' is no source of networks"),
        ("monai:VGG99", "monai does not build 'VGG99'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_there_is_not_is_an_error(network, said, capsys):
    assert cli.run(["inspect", network]) == 2
    assert said in " ".join(words(capsys)[1].split())


# --- weights, phantoms, demonstration


def test_weights_can_be_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path))
    assert cli.run(["weights", "list"]) == 0
    out = " ".join(words(capsys)[0].split())
    assert "vgg16 not fetched 58.9 MB" in out
    assert "efficientnet_lite0 not fetched 13.7 MB" in out
    assert f"Cache: {tmp_path}" in out
    for source in (source for backbone in BACKBONES.values() for source in backbone.sources):
        assert f"{source.filename} ({source.manual})" in out
    assert cli.run(["weights", "list", "--json"]) == 0
    listed = json.loads(words(capsys)[0])
    assert [(item["name"], item["path"]) for item in listed] == [(name, None) for name in BACKBONES]
    for item, backbone in zip(listed, BACKBONES.values(), strict=True):
        assert set(item["files"]) == {source.filename for source in backbone.sources}


def test_fetched_weights_are_named(tmp_path, monkeypatch, capsys):
    def fetch(name, *, progress):
        progress("source.h5", 5, 10)
        return tmp_path / f"{name}.safetensors"

    monkeypatch.setattr("chanscale.weights.fetch_weights", fetch)
    assert cli.run(["weights", "fetch", "--json"]) == 0
    out, err = words(capsys)
    assert json.loads(out) == {"name": "vgg16", "path": str(tmp_path / "vgg16.safetensors")}
    assert err == "source.h5 (10)\n"


def test_phantoms_are_drawn_into_a_new_folder(tmp_path, capsys):
    asked = ["phantom", str(tmp_path / "out"), "--count", "2", "--size", "64", "--seed", "1"]
    assert cli.run(asked) == 0
    assert words(capsys) == (f"{tmp_path / 'out'}\n", "drawing phantoms (2)\n")
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 2
    assert "exists already" in error_of(capsys, asked)


@pytest.fixture
def drawn(monkeypatch):
    """Draws stand-ins for phantoms, and counts how often."""
    calls = []

    def write_phantoms(out, *, count, image_size, seed, progress):
        calls.append((count, image_size))
        return draw(out, patients=4)

    monkeypatch.setattr(phantoms, "write_phantoms", write_phantoms)
    return calls


@pytest.mark.parametrize(("options", "wanted"), [([], demo.FULL), (["--quick"], demo.QUICK)])
def test_the_demo_goes_the_whole_way(tmp_path, asked, drawn, capsys, options, wanted):
    assert cli.run(["demo", "--out", str(tmp_path / "runs" / "demo"), *options]) == 0
    out, err = words(capsys)
    assert drawn == [(wanted.images, wanted.image_size)]
    assert asked.data == wanted.folder_beside(tmp_path / "runs" / "demo")
    assert (asked.config, asked.config.budget) == (wanted.config, 0.95)
    assert "14,714,688" in out
    assert out.rstrip().endswith("fit YOUR_IMAGES --out runs/mine --budget 0.95")
    assert "warning" not in err


def test_the_demo_uses_phantoms_that_are_there(tmp_path, asked, drawn):
    for name in ("one", "two"):
        assert cli.run(["demo", "--quick", "--out", str(tmp_path / name)]) == 0
    assert len(drawn) == 1


def test_the_demo_says_at_once_that_its_folder_is_there(tmp_path, asked, drawn, capsys):
    (tmp_path / "demo").mkdir()
    assert "exists already" in error_of(capsys, ["demo", "--out", tmp_path / "demo"])
    assert drawn == []


# --- progress


def moments_of(config):
    return list(plan_epochs(config))


def follow(watcher: Watcher, config: FitConfig) -> None:
    """Tell a watcher of a whole run."""
    for what, total in (("a_source_with_a_very_long_name.h5", 2_000_000), ("decoding images", 20)):
        for done in (0, total // 2, total):
            watcher.on_step(what, done, total)
    for moment in moments_of(config):
        for done in (1, 2):
            watcher.on_batch(moment, done, 2, 0.25 * done)
        row = {
            "train_loss": 0.375, "validation_auc": 0.8712, "parameters": 529_488, "parameters_removed": 0.964,
            "seconds": 1.25,
        }  # fmt: skip
        watcher.on_epoch(moment, row)


CONFIG = FitConfig(scale_epochs=2, refine_epochs=1)


def test_a_log_has_a_line_for_each_piece_of_work_and_each_epoch():
    text = io.StringIO()
    follow(display.LineWatcher(CONFIG, console=Console(file=text)), CONFIG)
    assert text.getvalue().splitlines() == [
        "a_source_with_a_very_long_name.h5 (2.00 M)",
        "decoding images (20)",
        *(
            f"epoch {number}/3 ({phase}): loss 0.375, validation AUC 0.871, 529,488 parameters left "
            "(96.4 % removed), 1.2 s"
            for number, phase in ((1, "scale"), (2, "scale"), (3, "refine"))
        ),
    ]


def test_bars_on_a_terminal_show_where_the_run_stands():
    text = io.StringIO()
    with display.RichWatcher(CONFIG, console=Console(file=text, force_terminal=True, width=80)) as watcher:
        follow(watcher, CONFIG)
    last = text.getvalue()
    for part in ("refine 3/3", "loss 0.375", "AUC 0.871", "529 k params", "20/20", "2.00 M/2.00 M"):
        assert part in last


def test_work_that_was_given_up_leaves_no_bar():
    watcher = display.RichWatcher(console=Console(file=io.StringIO()))
    watcher.on_step("first source", 1, 10)
    watcher.on_step("second source", 1, 10)
    assert [task.description for task in watcher._bars.tasks] == ["second source"]


def test_work_that_starts_anew_gets_another_bar():
    watcher = display.RichWatcher(console=Console(file=io.StringIO()))
    for done in (5, 10, 10, 5, 10):
        watcher.on_step("evaluating", done, 10)
    assert [task.completed for task in watcher._bars.tasks] == [10, 10]


def test_a_tolerance_adds_epochs_stage_by_stage():
    config = FitConfig(scale_epochs=4, refine_epochs=2, tolerance=0.01)
    plan = plan_epochs(config)
    counts = [display.count_epochs(config, next(plan)) for _ in range(10)]
    assert counts == [6] * 6 + [9] * 3 + [12]


def test_the_program_is_named_as_it_can_be_called(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert display.program() == f"{tmp_path / 'bin' / 'python'} -m chanscale"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "chanscale").touch()
    monkeypatch.chdir(tmp_path)
    assert display.program() == str(Path("bin") / "chanscale")


def test_json_has_null_for_what_is_not_defined(capsys):
    display.show_json({"auc": float("nan"), "intervals": {"auc": [float("nan"), 1.0]}})
    assert json.loads(words(capsys)[0]) == {"auc": None, "intervals": {"auc": [None, 1.0]}}


# --- the whole way


@dataclass(frozen=True)
class Fitted:
    data: Path
    run: Path
    model: object


@pytest.fixture
def tiny(monkeypatch):
    """The backbone `tiny`."""
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run that the command line made; tests only read it."""
    folder = tmp_path_factory.mktemp("fitted")
    data, run, runs = draw(folder / "data"), folder / "run", []
    original = pipeline.scale_and_select

    def keep(*arguments, **options):
        runs.append(original(*arguments, **options))
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        patch.setattr(pipeline, "scale_and_select", keep)
        assert cli.run(["fit", str(data), "--out", str(run), *OPTIONS]) == 0
    return Fitted(data, run, runs[0].model)


def test_a_fit_writes_a_whole_run_folder(fitted):
    wanted = {
        "config.yaml", "splits.csv", "history.csv", "metrics.json", "model.safetensors",
        "accuracy_size.png", "channels.png",
    }  # fmt: skip
    assert wanted <= set(files_below(fitted.run))
    assert not list(fitted.run.parent.glob("*.partial"))
    written = json.loads((fitted.run / "metrics.json").read_text())
    assert written["parameters"]["removed"] >= 0.5
    assert yaml.safe_load((fitted.run / "config.yaml").read_text())["backbone"] == "tiny"
    rows = list(csv.DictReader((fitted.run / "history.csv").read_text().splitlines()))
    assert len(rows) == 3
    assert sum(name.startswith("width:") for name in rows[0]) == 3


def test_evaluate_prints_one_object(fitted, tiny, capsys):
    pattern = "--group-pattern=^(\\d+)_"
    assert cli.run(["evaluate", str(fitted.run), str(fitted.data), pattern, "--json"]) == 0
    told = json.loads(words(capsys)[0])
    figures = {"auc", "accuracy", "sensitivity", "specificity", "n", "intervals"}
    assert set(told) == figures | {"classes", "positive", "threshold", "patients"}
    assert told["n"] == 48
    assert told["classes"] == ["clear", "spot"]
    assert (told["positive"], told["threshold"], told["patients"]) == ("spot", 0.5, 24)
    for name, (low, high) in told["intervals"].items():
        assert 0 <= low <= told[name] <= high <= 1


def test_evaluate_prints_a_table(fitted, tiny, capsys):
    assert cli.run(["evaluate", str(fitted.run), str(fitted.data)]) == 0
    out, err = words(capsys)
    assert "accuracy" in out
    assert "sensitivity at 0.5" in out
    assert "48 images of 24 patients" in out
    assert "patients are told by the run's own pattern, --group-pattern '^(\\d+)_'; '' for none" in err


def test_evaluate_takes_the_pattern_of_the_run_where_it_fits_all_names(fitted, tiny, tmp_path, capsys):
    told = {}
    for pattern in ([], ["--group-pattern=^(\\d+)_"]):
        assert cli.run(["evaluate", str(fitted.run), str(fitted.data), "--json", *pattern]) == 0
        told[len(pattern)] = json.loads(words(capsys)[0])
    assert told[0] == told[1]
    for number, path in enumerate(sorted(draw(tmp_path / "data", patients=8).glob("*/*.png"))):
        path.rename(path.with_name(f"{number // 2:04}-{number % 2}.png"))
    assert cli.run(["evaluate", str(fitted.run), str(tmp_path / "data")]) == 0
    out, err = words(capsys)
    assert "16 images" in out
    assert "patients" not in out
    assert "makes the intervals too narrow; if so, add --group-pattern" in err


def test_an_empty_pattern_tells_no_patients(fitted, tiny, capsys):
    assert cli.run(["evaluate", str(fitted.run), str(fitted.data), "--group-pattern", "", "--json"]) == 0
    out, err = words(capsys)
    assert json.loads(out)["patients"] is None
    assert "run's own pattern" not in err


def test_the_pattern_of_an_evaluation_has_its_own_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.run(["evaluate", "--help"])
    text = " ".join(words(capsys)[0].split())
    assert "drawing patients" in text
    assert "side of the split" not in text


def test_images_that_the_run_has_seen_are_pointed_out(fitted, tiny, tmp_path, capsys):
    rows = list(csv.DictReader((fitted.run / "splits.csv").read_text().splitlines()))
    seen = sum(row["split"] != "test" for row in rows)
    assert 0 < seen < 48
    for run in (fitted.run, fitted.run / "model.safetensors"):
        assert cli.run(["evaluate", str(run), str(fitted.data), "--group-pattern=^(\\d+)_"]) == 0
        [line] = [line for line in words(capsys)[1].splitlines() if line.startswith("warning: ")]
        assert f"splits.csv names {seen} of these 48 images as train or validation" in line
    for path in draw(tmp_path / "data", patients=4).glob("*/*.png"):
        path.rename(path.with_name(f"new{path.name}"))
    assert cli.run(["evaluate", str(fitted.run), str(tmp_path / "data"), "--group-pattern=^(.+)_"]) == 0
    assert "warning" not in words(capsys)[1]
    # Other images, but of patients that it has seen.
    assert cli.run(["evaluate", str(fitted.run), str(tmp_path / "data"), "--group-pattern=^new(.+)_"]) == 0
    [line] = [line for line in words(capsys)[1].splitlines() if line.startswith("warning: ")]
    trained_on = {row["group"] for row in rows if row["split"] != "test"}
    count = sum(path.name[3:].partition("_")[0] in trained_on for path in (tmp_path / "data").glob("*/*.png"))
    assert count > 0
    assert f"{count} of these 8 images are of patients of whom" in line


def test_of_a_source_with_test_images_only_those_are_evaluated(fitted, tiny, tmp_path, capsys):
    data = draw(tmp_path / "data", patients=8)
    rows = ["path,label,group,split"]
    for path in sorted(data.glob("*/*.png")):
        side = "test" if path.name < "004" else "train"
        rows.append(f"{path.relative_to(data)},{path.parent.name},{path.name[:3]},{side}")
    (data / "table.csv").write_text("\n".join(rows) + "\n")
    assert cli.run(["evaluate", str(fitted.run), str(data / "table.csv"), "--json"]) == 0
    out, err = words(capsys)
    assert json.loads(out)["n"] == 8
    assert "evaluating the 8 of 16 images" in err


def test_predict_in_a_new_process_gives_the_same_probabilities(fitted, tmp_path):
    image_folder = fitted.data / "spot"
    program = "import tiny_backbone as t; t.register(); from chanscale.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = ["predict", str(fitted.run), str(image_folder), "--out", str(tmp_path / "predictions.csv")]
    subprocess.run([sys.executable, "-c", program, *command], env=environment, check=True)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert list(rows[0])[:4] == ["image", "predicted", "probability_clear", "probability_spot"]
    assert list(rows[0])[4:] == ["novelty", "flagged", "reasons", "near_tie"]
    assert [row["image"] for row in rows] == [str(path) for path in sorted(image_folder.iterdir())]
    wanted = probabilities_of(fitted.model, image_folder)
    got = np.array([[float(row["probability_clear"]), float(row["probability_spot"])] for row in rows])
    # The same fp32 sums in another process, perhaps in another order: no worse than 1e-5.
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    assert np.ptp(got[:, 1]) > 1e-3  # were all alike, equality would say little


def probabilities_of(model, folder):
    """The probabilities of all images in a folder, without the command line."""
    pixels = np.stack([read_image(path, size=32) for path in sorted(folder.iterdir())])
    with torch.no_grad():
        return probabilities(model(torch.from_numpy(pixels.astype(np.float32) / 65535))).numpy()


def test_predict_prints_a_table_or_json(fitted, tiny, capsys):
    image = str(fitted.data / "spot" / "001_0.png")
    # Named twice, and once more in its folder: still one row for it.
    assert cli.run(["predict", str(fitted.run), image, image, str(fitted.data / "spot")]) == 0
    assert words(capsys)[0].replace("\n", "").replace(" ", "").count("001_0.png") == 1
    assert cli.run(["predict", str(fitted.run), image, "--json"]) == 0
    [told] = json.loads(words(capsys)[0])
    assert told["image"] == image
    assert told["predicted"] == max(told["probabilities"], key=told["probabilities"].get)
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_a_table_is_whole_in_a_pipe_and_has_names_alone_where_a_terminal_is_narrow(monkeypatch):
    rows = [
        (f"/a/very/long/folder/of/images/00{number}_0.png", "clear", "0.500", "0.500") for number in range(3)
    ]
    columns = ("image", "predicted", "clear", "spot")
    assert display.out.width == display.WIDEST

    def shown(width: int, wanted: str) -> bool:
        monkeypatch.setattr(display, "out", Console(file=io.StringIO(), width=width))
        display.out.print(display.describe_rows(columns, rows, paths=1))
        return all(wanted.format(number) in display.out.file.getvalue() for number in range(3))

    assert shown(display.WIDEST, "/a/very/long/folder/of/images/00{}_0.png")
    assert shown(80, "/a/very/long/folder/of/images/00{}_0.png")
    assert shown(50, "  …/00{}_0.png")
    rows = [(f"/a/very/long/folder/of/images/{name}/film_0.png", name, "0.5", "0.5") for name in "012"]
    assert shown(50, "  …/{}/film_0.png")  # their names are alike


@pytest.mark.parametrize("name", ["table.csv", "ARRAYS.NPZ"])
def test_a_set_is_no_image(fitted, tiny, tmp_path, capsys, name):
    (tmp_path / name).touch()
    line = error_of(capsys, ["predict", fitted.run, tmp_path / name])
    assert "which evaluate takes; wanted an image, or a folder of images" in line


@pytest.mark.parametrize(("name", "what"), [("model.onnx", "an ONNX export"), ("model.pt2", "a program")])
def test_an_export_is_no_run(fitted, tiny, tmp_path, capsys, name, what):
    (tmp_path / name).touch()
    for arguments in (["predict", tmp_path / name, "image.png"], ["verify", tmp_path / name]):
        line = error_of(capsys, arguments)
        assert f"{name} is no model file but {what}; pass a run folder" in line


@pytest.fixture
def bad_image(fitted, tmp_path):
    """A folder with one whole image and one that ends in the middle."""
    content = (fitted.data / "spot" / "001_0.png").read_bytes()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes(content)
    (tmp_path / "images" / "half.png").write_bytes(content[: len(content) // 2])
    return tmp_path / "images"


def test_one_bad_image_stops_a_prediction_and_writes_nothing(fitted, tiny, bad_image, tmp_path, capsys):
    table = tmp_path / "predictions.csv"
    assert "half.png" in error_of(capsys, ["predict", fitted.run, bad_image, "--out", table])
    assert not table.exists()


def test_one_bad_image_can_be_left_out_and_is_named(fitted, tiny, bad_image, tmp_path, capsys):
    table = tmp_path / "predictions.csv"
    assert cli.run(["predict", str(fitted.run), str(bad_image), "--skip-bad", "--out", str(table)]) == 0
    assert "left out 1 unreadable" in words(capsys)[1]
    assert [row["image"] for row in csv.DictReader(table.read_text().splitlines())] == [
        str(bad_image / "good.png")
    ]


def test_many_bad_images_are_counted_and_the_first_are_named(capsys):
    commands._report_skipped(tuple(f"{number}.png" for number in range(12)))
    line = words(capsys)[1]
    assert "left out 12 unreadable images: 0.png, " in line
    assert line.endswith("9.png and 2 more\n")


def test_images_that_are_not_there_are_named(fitted, tiny, tmp_path, capsys):
    assert "nowhere.png does not exist" in error_of(capsys, ["predict", fitted.run, tmp_path / "nowhere.png"])
    assert "holds no image" in error_of(capsys, ["predict", fitted.run, tmp_path])


def test_a_table_that_cannot_be_written_is_one_line(fitted, tiny, tmp_path, capsys):
    # No model is there either: the table is looked at first.
    line = error_of(capsys, ["predict", "no-run", "image.png", "--out", tmp_path / "nowhere" / "p.csv"])
    assert line.startswith(f"error: there is no folder {tmp_path / 'nowhere'} to write p.csv to; ")
    for folder in (tmp_path, "", "."):
        assert "is a folder; name a file" in error_of(capsys, ["predict", "no-run", "a.png", "--out", folder])


def test_a_table_takes_the_place_of_no_file(fitted, tiny, tmp_path, capsys):
    image = fitted.data / "spot" / "001_0.png"
    for path in (tmp_path / "film.png", tmp_path / "table.csv"):
        path.write_bytes(image.read_bytes())
        line = error_of(capsys, ["predict", fitted.run, image, "--out", path])
        assert ("is not called .csv" if path.suffix == ".png" else "exists already") in line
        assert path.read_bytes() == image.read_bytes()


def test_a_table_can_go_to_a_pipe(fitted, tiny, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        text = pool.submit(pipe.read_text)
        image = str(fitted.data / "spot" / "001_0.png")
        assert cli.run(["predict", str(fitted.run), image, "--out", str(pipe)]) == 0
        assert text.result(60).startswith("image,predicted,")
    assert pipe.is_fifo()


def test_a_file_name_that_is_no_utf8_can_be_predicted(fitted, tiny, tmp_path, capsys):
    image = tmp_path / os.fsdecode(b"R\xf6ntgen.png")
    image.write_bytes((fitted.data / "spot" / "001_0.png").read_bytes())
    table = tmp_path / "predictions.csv"
    assert cli.run(["predict", str(fitted.run), str(image), "--out", str(table)]) == 0
    assert os.fsencode(image) in table.read_bytes()
    words(capsys)
    assert cli.run(["predict", str(fitted.run), str(image)]) == 0
    assert "R\\udcf6ntgen.png" in words(capsys)[0].replace("\n", "").replace(" ", "")
    assert cli.run(["predict", str(fitted.run), str(image), "--json"]) == 0
    assert json.loads(words(capsys)[0])[0]["image"] == str(image)
    image.write_bytes(b"")
    assert "R\\udcf6ntgen.png: wanted" in error_of(capsys, ["predict", fitted.run, image])


def test_images_behind_links_are_predicted_and_lost_ones_named(fitted, tiny, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(fitted.data / "spot")
    assert cli.run(["predict", str(fitted.run), str(tmp_path / "images"), "--json"]) == 0
    assert len(json.loads(words(capsys)[0])) == len(list((fitted.data / "spot").iterdir()))
    (tmp_path / "images" / "lost.png").symlink_to(tmp_path / "gone.png")
    assert "lost.png: wanted" in error_of(capsys, ["predict", fitted.run, tmp_path / "images"])


def test_other_classes_than_those_of_the_run_are_refused(fitted, tiny, tmp_path, capsys):
    draw(tmp_path / "data", patients=4, classes=("clear", "stripe"))
    line = error_of(capsys, ["evaluate", fitted.run, tmp_path / "data"])
    assert "has the class 'stripe'; wanted only 'clear', 'spot'" in line


def test_a_damaged_model_is_one_line(fitted, tiny, tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    model.write_bytes((fitted.run / "model.safetensors").read_bytes()[:-100])
    assert "not a whole safetensors file" in error_of(capsys, ["evaluate", model, fitted.data])


# --- what a fit refuses


def truncate(folder):
    path = folder / "spot" / "001_0.png"
    path.write_bytes(path.read_bytes()[:200])


def give_four_channels(folder):
    Image.new("CMYK", (32, 32)).save(folder / "spot" / "001_0.png", format="TIFF")


def remove_class(folder):
    for path in (folder / "spot").iterdir():
        path.unlink()
    (folder / "spot").rmdir()


def leave_one_of_a_class(folder):
    for path in sorted((folder / "spot").iterdir())[1:]:
        path.unlink()


def empty(folder):
    for path in folder.rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (empty, [], "has no image"),
        (remove_class, [], "has only the class 'clear'"),
        (leave_one_of_a_class, [], "class 'spot' of .* has 1 image;"),
        (truncate, [], "001_0.png.*--skip-bad., where that is an option"),
        (give_four_channels, [], "001_0.png.*Convert it to grey or RGB"),
        (None, ["--head-lr=1e36"], "head_lr: Input should be less than or equal to 10"),
        (None, ["--min-channels=16"], "budget"),
        (None, ["--budget=0.999", "--min-channels=4"], "budget"),
        (None, ["--group-pattern=^(x+)"], "finds no patient"),
        (None, ["--positive=stripe"], "positive"),
        (None, ["--device=abacus"], "device='abacus' cannot be used"),
        (None, ["--backbone=nonsense"], "must be one of"),
        (None, ["--resume"], "there is no unfinished run"),
    ],
)
def test_what_cannot_be_fitted_is_one_line_and_leaves_nothing(
    tmp_path, tiny, capsys, damage, options, message
):
    data = draw(tmp_path / "data")
    if damage:
        damage(data)
    before = files_below(tmp_path)
    line = error_of(capsys, ["fit", data, "--out", tmp_path / "runs" / "run", *OPTIONS, *options])
    assert re.search(message, line), line
    assert files_below(tmp_path) == before


def test_a_run_folder_that_is_there_is_left_alone(tmp_path, tiny, capsys):
    data = draw(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    before = files_below(tmp_path)
    assert "exists already" in error_of(capsys, ["fit", data, "--out", tmp_path / "run", *OPTIONS])
    assert files_below(tmp_path) == before


def test_a_patient_on_two_sides_is_refused(tmp_path, tiny, capsys):
    data = draw(tmp_path / "data")
    rows = ["path,label,group,split"]
    for index, path in enumerate(sorted(data.glob("*/*.png"))):
        side = ("train", "test")[index % 2]
        rows.append(f"{path.relative_to(data)},{path.parent.name},{path.name[:3]},{side}")
    (data / "table.csv").write_text("\n".join(rows) + "\n")
    options = [option for option in OPTIONS if "group" not in option]
    before = files_below(tmp_path)
    line = error_of(capsys, ["fit", data / "table.csv", "--out", tmp_path / "run", *options])
    assert "stands on two sides" in line
    assert files_below(tmp_path) == before


def test_a_fit_can_leave_a_bad_image_out_and_counts_it(tmp_path, tiny, capsys):
    data = draw(tmp_path / "data")
    truncate(data)
    out = tmp_path / "run"
    assert cli.run(["fit", str(data), "--out", str(out), *OPTIONS, "--skip-bad", "--json"]) == 0
    told, warnings = words(capsys)
    assert json.loads(told)["images"]["skipped"] == 1
    assert "left out 1 unreadable image; " in warnings


def test_an_interrupted_fit_goes_on_to_the_same_end(tmp_path, tiny, fitted, monkeypatch, capsys):
    stop_after(monkeypatch, epochs=2)
    arguments = ["fit", str(fitted.data), "--out", str(tmp_path / "run"), *OPTIONS]
    assert cli.run(arguments) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert "go on with --resume" in error_of(capsys, arguments)
    monkeypatch.undo()
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    assert cli.run([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (again, info), (first, first_info) = load_model(tmp_path / "run"), load_model(fitted.run)
    assert info == first_info
    assert same_tensors(again, first)


def stop_after(monkeypatch, *, epochs):
    """Interrupt the run when this many epochs are told of."""
    told = []

    def on_epoch(self, moment, row):
        told.append(row)
        if len(told) > epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(display.LineWatcher, "on_epoch", on_epoch)
