"""Cells on Ray: a cluster of one node with two CPUs, joined by its address, and a Ray of the command's own."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

import tiny_cell
import tiny_trial
from chanscale import cli
from chanscale.comparison import processes, ray_cells
from chanscale.comparison.cells import read_cell
from chanscale.comparison.ray_cells import joined_ray
from chanscale.errors import ConfigError
from chanscale.tuning import search
from test_cli import OPTIONS, draw, error_of, words
from test_compare import cells_of, compare, require_interrupted, spec_of, wait_for_first_cell
from test_tune import trials_of

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs: pip install 'chanscale[ray]'")
TESTS = Path(__file__).parent
RAY_START = (
    sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
    "--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_token():
    """A token that only these tests know: Ray would leave one in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def address(_own_token) -> Iterator[str]:
    """A Ray of two workers, which know the folder of the tests; one for all of them."""
    port = free_port()
    with subprocess.Popen(
        [*RAY_START, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(port)
        yield f"127.0.0.1:{port}"
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        psutil.wait_procs(children, timeout=30)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("ray") / "data")


@pytest.fixture
def tiny(monkeypatch):
    """The tiny backbone and its methods, here and in the processes of cells."""
    tiny_cell.register(monkeypatch.setitem, monkeypatch.setattr)
    monkeypatch.setattr(processes, "CELL_PROGRAM", tiny_cell.PROGRAM)


@pytest.fixture
def hook(monkeypatch):
    """Sets what the processes that Ray starts call first."""
    import ray

    join = ray.init

    def set_hook(name: str) -> None:
        environment = {"worker_process_setup_hook": f"tiny_cell.{name}"}
        monkeypatch.setattr(ray, "init", partial(join, runtime_env=environment))

    set_hook("register")
    return set_hook


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("ray did not start")


def test_cells_on_ray_are_those_of_processes(data, tiny, tmp_path, capsys, monkeypatch, address, hook):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as many as a cell has on Ray
    monkeypatch.setattr(ray_cells, "PATIENCE", 300.0)  # of a busy machine
    asked = ["--methods=chanscale", "--only-folds=1", "--sizes=10", "--tries=1"]
    assert compare(data, tmp_path / "ray", *asked, "--ray", address) == 0
    out, err = words(capsys)
    assert re.search(r"^1/1 chanscale-n10-f1-s0: AUC \d", err, re.M)
    assert "Table and plots: " in out
    assert compare(data, tmp_path / "here", *asked) == 0
    assert cells_of(tmp_path / "ray") == cells_of(tmp_path / "here")
    assert len(cells_of(tmp_path / "ray")) == 1


def test_trials_on_ray_are_those_of_processes(data, tiny, tmp_path, capsys, monkeypatch, address, hook):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as many as a trial has on Ray
    monkeypatch.setattr(search, "TRIAL_PROGRAM", tiny_trial.PROGRAM)
    monkeypatch.setattr(ray_cells, "PATIENCE", 300.0)  # of a busy machine
    asked = ["tune", str(data), *OPTIONS, "--search=pressure,head_lr", "--trials=2"]
    assert cli.run([*asked, "--out", str(tmp_path / "ray"), "--ray", address]) == 0
    assert re.search(r"^2/2 trial 1: validation AUC \d", words(capsys)[1], re.M)
    assert cli.run([*asked, "--out", str(tmp_path / "here")]) == 0
    assert trials_of(tmp_path / "ray") == trials_of(tmp_path / "here")
    assert len(trials_of(tmp_path / "ray")) == 2


def test_a_killed_worker_costs_one_cell_and_the_next_run_completes_it(
    data, tiny, tmp_path, capsys, address, hook
):
    out, asked = tmp_path / "grid", ["--only-folds=0", "--ray", address]
    assert compare(data, out, "--methods=killed,head", *asked) == 1
    error = out / "cells" / "killed-all-f0-s0.error"
    lost = "failed: Ray lost the process (WorkerCrashedError); it may have lacked memory"
    assert f"killed-all-f0-s0: {lost} ({error})" in words(capsys)[1]
    kept = out / "cells" / "head-all-f0-s0.json"
    written = kept.stat().st_mtime_ns
    hook("register_healed")
    assert compare(data, out, "--methods=killed,head,broken", *asked) == 1
    err = words(capsys)[1]
    assert "3 cells: 3 methods x 1 size x 1 fold x 1 seed, up to 3 tries of each; 1 is there" in err
    assert read_cell(out / "cells" / "killed-all-f0-s0.json")
    assert not error.exists()
    assert kept.stat().st_mtime_ns == written
    broken = out / "cells" / "broken-all-f0-s0.error"
    assert f"broken-all-f0-s0: failed: the loss became nan; use a lower --head-lr ({broken})" in err
    assert broken.read_text() == "the loss became nan; use a lower --head-lr\n"


def test_what_a_node_lacks_is_said_in_one_line(data, tiny, tmp_path, address, hook):
    told, spec = [], spec_of(data, "head")
    with joined_ray(address, tmp_path, jobs=1, cpus=1, device="cpu", tell=told.append) as cells:
        error = cells.run(replace(spec, data=Path("/no/where")))
        assert re.fullmatch(r"/no/where does not exist on the node \S+; put the images there, .*", error)
    assert told == []
    with joined_ray(address, tmp_path, jobs=1, cpus=9, device="cpu", tell=told.append) as cells:
        cells.stop()
        assert cells.run(spec) == "stopped"
    assert told == [f"warning: no node of {address} has 9 CPUs and 0 GPUs; cells wait until one does"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ray", "nonsense"],
            r"nonsense cannot be used \(Invalid address format: nonsense\); check it, or",
        ),
        (
            ["--ray", "127.0.0.1:{port}"],
            r"\(nothing answers within 3 seconds\); check it, or use --ray local",
        ),
        (["--ray", ""], "--ray must be local, auto, host:port or ray://host:port"),
        (["--ray-cpus", "2"], "--ray-cpus is for cells on Ray"),
    ],
)
def test_an_address_without_ray_is_one_line(data, tiny, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(ray_cells, "PATIENCE", 3.0)
    options = [option.format(port=free_port()) for option in options]
    line = error_of(capsys, ["compare", data, "--out", tmp_path / "grid", *OPTIONS, *options])
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_working_folder_is_not_taken_for_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray.py").write_text("raise SystemExit('a file of the folder')")
    with pytest.raises(ConfigError, match="Invalid address format"):
        ray_cells._require_answer("nonsense")


def test_without_ray_the_error_says_how_to_install_it(data, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = error_of(capsys, ["compare", data, "--out", tmp_path / "grid", *OPTIONS, "--ray=local"])
    assert line.endswith("which is not installed here: pip install 'chanscale[ray]'")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_a_ray_of_our_own_and_leaves_nothing_half_written(data, tmp_path):
    program = (
        "import signal, ray, functools, tiny_cell; tiny_cell.register()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "ray.init = functools.partial(\n"
        "    ray.init, runtime_env={'worker_process_setup_hook': 'tiny_cell.register'}\n"
        ")\n"
        "from chanscale.cli import main; main()"
    )
    out = tmp_path / "grid"
    asked = ["--folds=3", "--methods=head,endless", "--only-folds=0", "--ray=local", "--jobs=2"]
    with subprocess.Popen(
        [sys.executable, "-c", program, "compare", str(data), "--out", str(out), *OPTIONS, *asked],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for_first_cell(process)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        require_interrupted(process, out)
    assert children
    assert psutil.wait_procs(children, timeout=30)[1] == []
