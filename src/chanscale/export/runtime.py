"""ONNX Runtime, which is an extra: graphs opened and run on the CPU."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.errors import ConfigError
from chanscale.export.denormals import denormals_flushed, flushes_denormals

INPUT, PROBABILITIES, CLASS_MAP = "pixels", "probabilities", "class_map"
"""What graphs call what they take and give."""

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]
"""From raw pixels (N, C, H, W), 0 to 255, to probabilities (N, K)."""


def open_session(graph: bytes | Path, *, threads: int = 0) -> Any:
    """Open a graph, to run on `threads` (0: as many as there are cores). Raises ConfigError without the extra."""
    runtime = require_extra()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone: what is wrong is raised
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    model = str(graph) if isinstance(graph, Path) else graph
    # The entry is meant for the session's threads, and sets this one too.
    with denormals_flushed(flushes_denormals()):
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(session: Any) -> Run:
    """Return the function from pixels to probabilities that `session` computes."""

    def run(pixels: Floats) -> Floats:
        with denormals_flushed():  # the calling thread takes its share of the work
            found: Floats = session.run([PROBABILITIES], {INPUT: pixels})[0]
        return found

    return run


def require_extra() -> ModuleType:
    """Return ONNX Runtime. Raises ConfigError when it, or what writes graphs, is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx imports it
    except ImportError as error:
        raise ConfigError(f"this needs {error.name}: pip install 'chanscale[export]'") from error
    module: ModuleType = onnxruntime
    return module
