"""ONNX Runtime, which is an extra: graphs opened and run on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.errors import ChanscaleError, ConfigError, ModelError, lacks_memory, one_line
from chanscale.export.denormals import denormals_flushed, flushes_denormals

INPUT, PROBABILITIES, CLASS_MAP = "pixels", "probabilities", "class_map"
"""What graphs call what they take and give."""
DESCRIPTION = "chanscale"
"""The entry of a graph's metadata in which it says what it is, as JSON."""

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]
"""From raw pixels (N, C, H, W), 0 to 255, to probabilities (N, K)."""


def open_session(graph: bytes | Path, *, threads: int = 0) -> Any:
    """Open a graph, to run on `threads` (0: as many as there are cores).

    Raises ConfigError without the extra, ModelError for a graph that ONNX Runtime has no kernels for.
    """
    runtime = require_extra()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone: what is wrong is raised
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    model = str(graph) if isinstance(graph, Path) else graph
    # The entry is meant for the session's threads, and sets this one too.
    with denormals_flushed(flushes_denormals()), telling("open"):
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(session: Any) -> Run:
    """Return the function from pixels to probabilities that `session` computes; it raises ModelError."""

    def run(pixels: Floats) -> Floats:
        with denormals_flushed(), telling("run"):  # the calling thread takes its share of the work
            found: Floats = session.run([PROBABILITIES], {INPUT: pixels})[0]
        return found

    return run


@contextmanager
def telling(task: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises into a ModelError of one line, and into MemoryError where memory is what it lacks.

    Its classes are plain exceptions, each by itself.
    """
    try:
        yield
    except (ChanscaleError, OSError):
        raise
    except Exception as error:
        if lacks_memory(error) or "allocate memory" in str(error):
            raise MemoryError(one_line(error)) from error
        raise ModelError(
            f"ONNX Runtime cannot {task} the graph of this network: {one_line(error)[:200].rstrip('.')}; "
            "export --format torch does without it"
        ) from error


def require_extra() -> ModuleType:
    """Return ONNX Runtime. Raises ConfigError when it, or what writes graphs, is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx imports it
    except ImportError as error:
        raise ConfigError(f"this needs {error.name}: pip install 'chanscale[export]'") from error
    module: ModuleType = onnxruntime
    return module
