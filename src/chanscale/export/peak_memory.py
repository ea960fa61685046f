"""The most memory that a network takes: measured in a process that does nothing but open it, and run it once."""

import signal
import subprocess
import sys
from pathlib import Path

from chanscale.errors import ModelError

MEASURE = """
import sys
import psutil, numpy as np


def peak():
    if sys.platform == "linux":  # what getrusage says there includes the process that started this one
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


path, threads, *shape = sys.argv[1:]
pixels = np.zeros([int(side) for side in shape], np.float32)
if path.endswith(".onnx"):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    before = psutil.Process().memory_info().rss
    onnxruntime.InferenceSession(path, options).run(None, {"pixels": pixels})
else:
    import torch
    torch.set_num_threads(int(threads))
    before = psutil.Process().memory_info().rss
    with torch.no_grad():
        torch.export.load(path).module()(torch.from_numpy(pixels))
print(peak() - before)
"""
"""The program of that process. It imports nothing of ours: what it holds is the runtime and the network."""


def measure_peak_memory(graph: Path, shape: tuple[int, ...], *, threads: int) -> int:
    """Return the bytes that opening `graph` (.onnx or .pt2) and running it on pixels of `shape` takes at most.

    What the runtime itself takes, without a network, is not counted. Raises ModelError.
    """
    arguments = [str(graph), str(threads), *map(str, shape)]
    try:
        done = subprocess.run(
            # -P: a psutil.py in the working folder is not run.
            [sys.executable, "-P", "-W", "ignore", "-c", MEASURE, *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise ModelError(
            f"the memory of {graph.name} could not be measured: {_describe_end(error)}"
        ) from error
    return max(0, int(done.stdout))


def _describe_end(error: subprocess.CalledProcessError) -> str:
    if error.returncode < 0:
        name = signal.Signals(-error.returncode).name
        return f"its process was ended by {name}, and may have lacked memory; try a smaller --image-size or --batches"
    words: list[str] = error.stderr.strip().splitlines()
    return words[-1][:200] if words else f"its process ended with exit code {error.returncode}"
