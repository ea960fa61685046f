"""A run against the network that it was made of: latency, memory and size, in PyTorch and in ONNX Runtime."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.classifier import to_channels_last
from chanscale.export.deployed import DeployedClassifier, deploy, dynamic_axes, example_shape
from chanscale.export.examples import draw_examples
from chanscale.export.latency import Timing, draw_pixels, time_in_turns, torch_threads
from chanscale.export.onnx_file import describe_graph, to_onnx
from chanscale.export.original import deploy_original
from chanscale.export.peak_memory import measure_peak_memory
from chanscale.export.quantising import quantise_onnx
from chanscale.export.runtime import Floats, Run, open_session, require_extra, run_session
from chanscale.files import write_atomically
from chanscale.programs import Program, pack_program, trace_program

ORIGINAL, SMALL, INT8 = "original", "small", "int8"
PYTORCH, ONNX_RUNTIME = "PyTorch", "ONNX Runtime"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """One network in one runtime at one batch size: seconds for the batch, and the most bytes that it took."""

    network: str
    runtime: str
    batch: int
    timing: Timing
    memory: int


@dataclass(frozen=True)
class Race:
    """What was measured, at `image_size` pixels on `threads`; `macs` for one image, `sizes` of the ONNX files."""

    image_size: int
    threads: int
    macs: dict[str, int]
    sizes: dict[str, int]
    entries: tuple[Entry, ...]

    def gain(self, entry: Entry) -> float:
        """Return how many times faster `entry` is than the original in the same runtime, by the medians."""
        original = next(
            other for other in self.entries
            if (other.network, other.runtime, other.batch) == (ORIGINAL, entry.runtime, entry.batch)
        )  # fmt: skip
        return original.timing.median / entry.timing.median


@dataclass(frozen=True)
class _Lane:
    """Networks in one runtime, by name, and the files that hold them."""

    runtime: str
    runs: dict[str, Run]
    files: dict[str, Path]


def measure_latency(
    run: str | Path,
    *,
    image_size: int | None = None,
    batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    seconds: float = 20.0,
    int8: bool = False,
    progress: Progress | None = None,
) -> Race:
    """Time the model of a run and its original in turns, for about `seconds` each batch size and runtime.

    `image_size`: default, what the run was trained on. `threads`: default, as many as PyTorch would use. `int8`: the
    run in int8 too, with ranges from phantoms, which change no time. Raises ConfigError without the extra,
    ArtifactError, WeightsError, ModelError.
    """
    require_extra()
    model, info = load_model(model_path(Path(run)))
    info.require_pictures("latency")
    size, threads = image_size or info.image_size, threads or torch.get_num_threads()
    networks = {
        ORIGINAL: deploy_original(info, image_size=size, progress=progress),
        SMALL: deploy(model, info, image_size=size),
    }
    with tempfile.TemporaryDirectory(prefix="chanscale-") as folder, torch_threads(threads):
        lanes = _open_lanes(networks, info, Path(folder), int8=int8, threads=threads)
        entries = [
            entry
            for batch in batches
            for lane in lanes
            for entry in _time(
                lane,
                draw_pixels(batch, info.channels, size),
                seconds=seconds,
                threads=threads,
                progress=progress,
            )
        ]
        sizes = {name: file.stat().st_size for name, file in lanes[-1].files.items()}
    macs = {name: count_macs(network, info, size) for name, network in networks.items()}
    return Race(size, threads, macs, sizes, tuple(entries))


def _open_lanes(
    networks: dict[str, DeployedClassifier], info: ModelInfo, folder: Path, *, int8: bool, threads: int
) -> tuple[_Lane, _Lane]:
    """Write each network in both forms, and open it in both runtimes; ONNX Runtime comes last."""
    programs = {name: folder / f"{name}.pt2" for name in networks}
    graphs = {name: folder / f"{name}.onnx" for name in networks}
    for name, network in networks.items():
        program = trace_program(network, example_shape(network), dynamic_axes(network))
        write_atomically(programs[name], pack_program(program))
        write_atomically(graphs[name], to_onnx(network, describe_graph(info)))
    if int8:
        phantoms = draw_examples(grey_only=networks[SMALL].grey_only)
        graphs[INT8] = folder / f"{INT8}.onnx"
        write_atomically(graphs[INT8], quantise_onnx(graphs[SMALL].read_bytes(), phantoms))
    sessions = {name: run_session(open_session(graph, threads=threads)) for name, graph in graphs.items()}
    eager = {name: _eager(network) for name, network in networks.items()}
    return _Lane(PYTORCH, eager, programs), _Lane(ONNX_RUNTIME, sessions, graphs)


def _time(
    lane: _Lane, pixels: Floats, *, seconds: float, threads: int, progress: Progress | None
) -> Iterator[Entry]:
    batch = len(pixels)
    step = partial(progress, f"{lane.runtime}, batch {batch}") if progress else None
    timings = time_in_turns(lane.runs, pixels, seconds=seconds, progress=step)
    for name, timing in timings.items():
        memory = measure_peak_memory(lane.files[name], pixels.shape, threads=threads)
        yield Entry(name, lane.runtime, batch, timing, memory)


@torch.no_grad()
def count_macs(deployed: DeployedClassifier, info: ModelInfo, image_size: int) -> int:
    """Return the multiplications that a network does for one image, without the resize."""
    network = deployed.network
    channels = network.shape[0] if isinstance(network, Program) else info.channels
    images = torch.zeros(1, channels, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        (network.graph if isinstance(network, Program) else network)(images)
    return int(counter.get_total_flops()) // 2


def _eager(deployed: DeployedClassifier) -> Run:
    if not isinstance(deployed.network, Program):
        to_channels_last(deployed.network)

    @torch.inference_mode()
    def run(pixels: Floats) -> Floats:
        found: Floats = deployed(torch.from_numpy(pixels))[0].numpy()
        return found

    return run
