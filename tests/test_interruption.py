"""A run that is killed, or that finds the disk full, goes on to the same end; what is there meanwhile is whole."""

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny_backbone
from chanscale import cli, files
from chanscale.artifact import read_tensors
from chanscale.errors import ArtifactError, ConfigError
from chanscale.learning import Learner
from chanscale.runs import RunFolder
from test_cli import OPTIONS, draw, error_of, files_below
from tiny_fits import tiny_config

VARYING = {"seconds", "peak_memory_bytes"}
MOMENTS = (
    ("config.yaml", 1, signal.SIGKILL), ("depth.json", 1, signal.SIGKILL),
    ("checkpoint.safetensors", 2, signal.SIGKILL), ("checkpoint.safetensors", 2, signal.SIGINT),
    ("report.html", 1, signal.SIGKILL),
)  # fmt: skip
READERS = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".yaml": lambda path: yaml.safe_load(path.read_bytes()),
    ".csv": lambda path: list(csv.DictReader(io.StringIO(path.read_text()), strict=True)),
    ".safetensors": load_file,
    ".png": Path.read_bytes,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


@dataclass(frozen=True)
class Fitted:
    """The images, and the run folder of a fit that nothing disturbed."""

    data: Path
    run: Path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    fitted = Fitted(draw(folder / "data"), folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        assert cli.run(fit_into(fitted.run, fitted.data)) == 0
    return fitted


def fit_into(out, data) -> list[str]:
    return ["fit", str(data), "--out", str(out), *OPTIONS]


def content_of(run: Path) -> dict[str, object]:
    """Return what each file holds, less what no two runs have alike; of the report its name alone."""
    found = {path.name: path for path in run.iterdir()}
    return {
        name: path.read_bytes() if path.suffix in (".safetensors", ".yaml", ".png") else read(path)
        for name, path in found.items()
    }


def read(path: Path) -> object:
    if path.suffix == ".html":
        return None
    content = READERS[path.suffix](path)
    rows = content if isinstance(content, list) else [content]
    return [{name: value for name, value in row.items() if name not in VARYING} for row in rows]


# --- kills


def be_killed(arguments, moments, folder) -> list[int]:
    """Run the command until it is done, ended at each moment; return the exit codes."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), *arguments],
        input=json.dumps(moments), cwd=folder, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_run_killed_in_the_midst_of_writes_goes_on_to_the_same_end(undisturbed, tmp_path):
    codes = be_killed(fit_into("run", undisturbed.data), MOMENTS, tmp_path)
    assert codes == [-9, -9, -9, 130, -9, 0]
    assert content_of(tmp_path / "run") == content_of(undisturbed.run)
    assert not (tmp_path / "run.partial").exists()
    for number in range(len(MOMENTS)):
        left = [path for path in (tmp_path / f"after-{number}").iterdir() if path.name[0] != "."]
        assert all(READERS[path.suffix](path) for path in left)
    epochs = [len(load_story(tmp_path / f"after-{number}")["history"]) for number in range(2, len(MOMENTS))]
    assert epochs == [1, 2, 3]  # an epoch is lost at most


def load_story(partial: Path) -> dict:
    return read_tensors(partial / "checkpoint.safetensors")[1]["story"]


def test_a_folder_that_holds_no_configuration_yet_is_gone_on_with(tmp_path):
    (tmp_path / "run.partial").mkdir()
    for name in (".lock", ".config.yaml.17.tmp"):
        (tmp_path / "run.partial" / name).touch()
    assert RunFolder.open(tmp_path / "run", tiny_config(), resume=True)
    with pytest.raises(ArtifactError, match="go on with --resume"):
        RunFolder.open(tmp_path / "run", tiny_config(), resume=False)
    (tmp_path / "run.partial" / "precious.txt").touch()
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*config\.yaml"):
        RunFolder.open(tmp_path / "run", tiny_config(), resume=True)


def test_the_last_checkpoint_is_there_until_the_run_has_its_place(undisturbed, tmp_path, monkeypatch):
    def refuse(path, target):
        raise KeyboardInterrupt

    arguments = fit_into(tmp_path / "run", undisturbed.data)
    monkeypatch.setattr(Path, "rename", refuse)
    assert cli.run(arguments) == 130
    assert len(load_story(tmp_path / "run.partial")["history"]) == 3
    monkeypatch.undo()
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    assert cli.run([*arguments, "--resume"]) == 0
    assert content_of(tmp_path / "run") == content_of(undisturbed.run)


# --- a full disk


@pytest.fixture
def disk(monkeypatch):
    """A disk on which `room` more files can be written."""
    disk = SimpleNamespace(room=1000)

    def sync(descriptor):
        disk.room -= 1
        if disk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", sync)
    return disk


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(undisturbed, tmp_path, disk, capsys):
    arguments = fit_into(tmp_path / "run", undisturbed.data)
    names, told = [], []
    for room in (2, 4, 6, 9):
        disk.room = room
        resume = ["--resume"] * (tmp_path / "run.partial").exists()
        told.append(error_of(capsys, [*arguments, *resume]))
        names.append(Path(told[-1].split(": ")[1]).name)
        left = list((tmp_path / "run.partial").iterdir())
        assert all(READERS[path.suffix](path) for path in left), left
    assert all("the disk is full; make room on it; go on after the last whole epoch" in line for line in told)
    assert all(line.endswith("--resume") for line in told)
    assert names == ["depth.json", "checkpoint.safetensors", "novelty.safetensors", "report.html"]
    disk.room = 1000
    assert cli.run([*arguments, "--resume"]) == 0
    assert content_of(tmp_path / "run") == content_of(undisturbed.run)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()], ids=repr
)
def test_without_enough_memory_it_is_one_line_and_the_run_goes_on(
    undisturbed, tmp_path, monkeypatch, capsys, error
):
    arguments, calls, whole = fit_into(tmp_path / "run", undisturbed.data), [], Learner.backward

    def give_out(self, *given):
        calls.append(given)
        if len(calls) > 30:
            raise error
        return whole(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "backward", give_out)
        line = error_of(capsys, arguments)
    assert line.startswith(
        "error: out of memory; --recompute 1 takes less; go on after the last whole epoch with: "
    )
    assert len(load_story(tmp_path / "run.partial")["history"]) >= 1
    assert cli.run([*arguments, "--resume", "--recompute=1"]) == 0
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_defect_is_not_taken_for_a_lack_of_memory(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, "backward", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.run(fit_into(tmp_path / "run", undisturbed.data))


def test_a_disk_that_is_full_at_once_leaves_nothing(undisturbed, tmp_path, disk, capsys):
    disk.room = 0
    line = error_of(capsys, fit_into(tmp_path / "run", undisturbed.data))
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_finds_no_room_leaves_nothing(undisturbed, tmp_path, disk, capsys):
    table = tmp_path / "predictions.csv"
    disk.room = 0
    arguments = ["predict", str(undisturbed.run), str(undisturbed.data), "--out", str(table)]
    assert error_of(capsys, arguments) == f"error: {table}: the disk is full; make room on it"
    assert files_below(tmp_path) == {}
