"""Several processes, on one machine or on two, come to what one comes to; and one that dies ends the job."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chanscale.artifact import load_model
from test_cli import OPTIONS, draw, error_of
from tiny_backbone import register

HERE = Path(__file__).parent
LIKE = {**os.environ, "OMP_NUM_THREADS": "1"}
FIT = [*OPTIONS, "--device=cpu", "--micro-batch=3"]
PATIENCE = 600


def start(*arguments, program=(sys.executable, HERE / "tiny_cli.py"), env=None):
    words = [str(word) for word in (*program, *arguments)]
    return subprocess.Popen(
        words, env=LIKE | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def same_files(one, other):
    for name in ("model.safetensors", "splits.csv", "report.html"):
        assert (one / name).exists()
    assert (one / "splits.csv").read_bytes() == (other / "splits.csv").read_bytes()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def assert_alike(one, other):
    """Assert that two runs kept the same channels, epoch by epoch as many, and that their figures are close."""
    (_, first), (_, second) = load_model(one), load_model(other)
    assert first.kept == second.kept
    tables = [list(csv.DictReader((run / "history.csv").read_text().splitlines())) for run in (one, other)]
    for row, twin in zip(*tables, strict=True):
        assert [row[name] for name in row if "width" in name or name == "parameters"] == [
            twin[name] for name in row if "width" in name or name == "parameters"
        ]
        assert float(row["train_loss"]) == pytest.approx(float(twin["train_loss"]), abs=0.02)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    for name in ("auc", "accuracy"):
        assert figures[0][name]["value"] == pytest.approx(figures[1][name]["value"], abs=0.02)
    assert figures[0]["n"] == figures[1]["n"]
    assert figures[0]["calibration"]["after"]["nll"]["value"] == pytest.approx(
        figures[1]["calibration"]["after"]["nll"]["value"], abs=0.05
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch.setitem, monkeypatch.setattr)
        yield draw(tmp_path_factory.mktemp("team") / "images")


@pytest.fixture(scope="module")
def alone(images):
    """The run of one process."""
    run = images.parent / "alone"
    code, _, err = finish(start("fit", images, "--out", run, *FIT))
    assert code == 0, err
    return run


@pytest.fixture(scope="module")
def pair(images):
    """The run of two processes on this machine, and what the command said."""
    run = images.parent / "pair"
    code, out, err = finish(start("fit", images, "--out", run, *FIT, "--devices=2"))
    assert code == 0, err
    return run, out, err


@pytest.mark.parametrize("size", [2, 3])
def test_the_laws_of_a_team_hold_in_each_process(tmp_path, size):
    program = (sys.executable, HERE / "team_laws.py")
    processes = [start(tmp_path / "meeting", rank, size, program=program) for rank in range(size)]
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, err
        assert out == "all laws hold\n"


def test_two_processes_keep_the_channels_of_one_and_come_to_its_figures(alone, pair):
    assert_alike(alone, pair[0])


def test_the_first_process_alone_speaks_and_writes(pair):
    run, out, err = pair
    assert out.count("Run folder:") == 1
    assert "error" not in err
    assert not [path for path in run.parent.iterdir() if path.name not in ("images", "alone", "pair")]


def test_torchrun_starts_a_job_too(images, alone):
    run = images.parent / "elastic"
    torchrun = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HERE / "tiny_cli.py",
    )  # fmt: skip
    code, out, err = finish(start("fit", images, "--out", run, *FIT, program=torchrun))
    assert code == 0, err
    assert out.count("Run folder:") == 1
    assert_alike(alone, run)
    shutil.rmtree(run)


def test_a_process_that_dies_ends_the_job_with_a_line_and_the_job_resumes(images, pair):
    run = images.parent / "killed"
    partial = run.with_name("killed.partial")
    command = ("fit", images, "--out", run, *FIT, "--devices=2")
    process = start(*command)
    wait_for(partial / "checkpoint.safetensors", process)
    os.kill(child_of(process.pid), signal.SIGKILL)
    code, out, err = finish(process)
    assert code != 0
    assert out == ""
    assert "Traceback" not in err
    assert re.search(r"error: (another process of the job is gone|a process of the job ended)", err)
    assert "--resume" in err
    assert (partial / "checkpoint.safetensors").exists()
    assert not run.exists()
    code, _, err = finish(start(*command, "--resume"))
    assert code == 0, err
    same_files(run, pair[0])


def wait_for(path, process):
    for _ in range(10 * PATIENCE):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(path)


def child_of(parent):
    """Return the number of the process that a process started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices=0"], "devices"),
        (["--devices=2", "--device=nonsense"], "cannot be had"),
    ],
)
def test_a_team_that_cannot_be_had_is_one_line(images, tmp_path, options, said):
    words = ("fit", images, "--out", tmp_path / "run", *OPTIONS, *options)
    code, out, err = finish(start(*words))
    assert code == 2
    assert out == ""
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compare", "cross-validate", "tune"])
def test_what_has_many_fits_runs_each_in_one_process(images, tmp_path, capsys, command):
    words = (command, images, "--out", tmp_path / "out", *OPTIONS, "--devices=2")
    assert "leave devices, nodes and torchrun out" in error_of(capsys, words)
    assert not list(tmp_path.iterdir())


# --- two hosts


@pytest.fixture
def hosts():
    """Two network namespaces that reach each other through a cable of their own: hosts, as far as sockets can tell."""
    names, ip = [f"chanscale{os.getpid()}{end}" for end in "ab"], shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("needs to be root, and iproute2: apt-get install iproute2")

    def call(*words, check=True):
        return subprocess.run([ip, *words], capture_output=True, text=True, check=check)

    def connect():
        ends = [f"cs{os.getpid() % 10**6}{end}" for end in "ab"]
        for name in names:
            call("netns", "add", name)
        call("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            call("link", "set", end, "netns", name)
            for words in (
                ["addr", "add", address, "dev", end],
                ["link", "set", end, "up"],
                ["link", "set", "lo", "up"],
            ):
                call("-n", name, *words)
        return ends

    try:
        try:
            ends = connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
        yield [
            ((ip, "netns", "exec", name, sys.executable, HERE / "tiny_cli.py"), end)
            for name, end in zip(names, ends, strict=True)
        ]
    finally:
        for name in names:
            call("netns", "delete", name, check=False)


def test_two_hosts_keep_the_channels_of_one_process_and_come_to_its_figures(images, alone, hosts):
    run = images.parent / "hosts"
    meeting = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start(
            "fit", images, "--out", run, *FIT, "--nodes=2", program=program,
            env=meeting | {"NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": end, "LOCAL_RANK": "0"},
        )
        for rank, (program, end) in enumerate(hosts)
    ]  # fmt: skip
    for code, _, err in map(finish, processes):
        assert code == 0, err
    assert_alike(alone, run)


def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
