"""Networks are timed in turns, side by side, and what is not faster is said to be so."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from chanscale import cli
from chanscale.errors import ModelError
from chanscale.export import latency, peak_memory, race
from chanscale.export.latency import Timing, draw_pixels, time_in_turns
from chanscale.export.peak_memory import measure_peak_memory
from chanscale.export.race import Entry, Race
from test_cli import error_of, words
from test_export import made  # noqa: F401  # a fixture


def test_networks_take_turns_and_the_order_is_turned_about(monkeypatch):
    clock, order = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(latency, "perf_counter", lambda: clock.now)

    def network(name, seconds):
        def run(pixels):
            order.append(name)
            clock.now += seconds

        return run

    heard = []
    networks = {"a": network("a", 1.0), "b": network("b", 3.0)}
    timings = time_in_turns(networks, np.zeros(1), seconds=30, progress=lambda *step: heard.append(step))
    assert order[:4] == ["a", "a", "b", "b"]  # not counted
    assert "".join(order[4:]) == "abbaabbaabbaabba"
    assert timings == {"a": Timing(1, 1, 1, 8), "b": Timing(3, 3, 3, 8)}
    assert heard[-1] == (30, 30)


def test_there_are_five_rounds_however_long_they_take():
    runs = []
    timings = time_in_turns({"a": runs.append}, np.zeros(1), seconds=0)
    assert timings["a"].rounds == 5
    assert len(runs) == 5 + latency.WARM_UP


def test_the_gain_is_over_the_original_in_the_same_runtime_at_the_same_batch():
    def entry(network, runtime, batch, median):
        return Entry(network, runtime, batch, Timing(median, median, median, 5), 0)

    entries = (
        entry("original", "PyTorch", 1, 8.0), entry("small", "PyTorch", 1, 2.0),
        entry("original", "ONNX Runtime", 1, 6.0), entry("small", "ONNX Runtime", 1, 1.0),
    )  # fmt: skip
    raced = Race(32, 1, {}, {}, entries)
    assert [raced.gain(one) for one in entries] == [1, 4, 1, 6]


def test_the_command_measures_both_networks_in_both_runtimes(made, capsys):  # noqa: F811
    arguments = [str(made[0]), "--batches", "1,3", "--threads", "1", "--seconds", "0.1", "--json"]
    assert cli.run(["latency", *arguments]) == 0
    told = json.loads(words(capsys)[0])
    assert (told["image_size"], told["threads"]) == (32, 1)
    found = {(row["network"], row["runtime"], row["batch"]) for row in told["entries"]}
    assert found == {
        (network, runtime, batch)
        for network in ("original", "small") for runtime in ("PyTorch", "ONNX Runtime") for batch in (1, 3)
    }  # fmt: skip
    assert all(
        0 < row["timing"]["low"] <= row["timing"]["median"] <= row["timing"]["high"]
        for row in told["entries"]
    )
    assert all(row["memory"] > 0 for row in told["entries"])
    assert told["macs"]["small"] < told["macs"]["original"]
    # 3 x 3 filters of 8, 16 and 16 channels at 32, 16 and 8 pixels, and the head.
    assert told["macs"]["original"] == 9 * (3 * 8 * 32**2 + 8 * 16 * 16**2 + 16 * 16 * 8**2) + 16


def test_what_is_not_faster_is_said_to_be_so(made, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        race, "time_in_turns", lambda runs, *_, **__: {name: Timing(1, 1, 1, 5) for name in runs}
    )
    assert cli.run(["latency", str(made[0]), "--batches", "1"]) == 0
    out, err = words(capsys)
    assert "1.0 x" in out
    assert "warning: small is not faster than the original in ONNX Runtime at batch 1" in err


@pytest.mark.parametrize("batches", ["", "1,x", "0", "1;2"])
def test_batches_are_whole_numbers(made, capsys, batches):  # noqa: F811
    assert "--batches takes whole numbers above 0" in error_of(
        capsys, ["latency", made[0], "--batches", batches]
    )


def test_a_missing_extra_says_how_to_get_it(made, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'chanscale[export]'" in error_of(capsys, ["latency", made[0]])


def test_a_graph_that_cannot_be_run_is_one_line(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"the memory of broken\.onnx could not be measured: [^\n]+$"):
        measure_peak_memory(broken, (1, 1, 8, 8), threads=1)


def test_a_measurement_that_was_killed_says_so_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(peak_memory, "MEASURE", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(
        ModelError, match=r"ended by SIGKILL, and may have lacked memory; try a smaller --image-size"
    ):
        measure_peak_memory(tmp_path / "m.onnx", (1, 1, 8, 8), threads=1)


def test_a_measurement_runs_no_module_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "psutil.py").write_text("raise SystemExit('a file of the folder')")
    with pytest.raises(ModelError) as caught:
        measure_peak_memory(tmp_path / "m.onnx", (1, 1, 8, 8), threads=1)
    assert "a file of the folder" not in str(caught.value)


def test_pixels_to_time_on_are_raw_pixels():
    pixels = draw_pixels(3, 1, 40)
    assert pixels.shape == (3, 1, 40, 40)
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert 200 < pixels.max() <= 255
