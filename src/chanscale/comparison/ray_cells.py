"""Cells run by Ray, on this machine or on a cluster: a task for each, in a process that ends with it."""

import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from chanscale import __version__
from chanscale.comparison.processes import Spec
from chanscale.errors import ChanscaleError, ConfigError, one_line
from chanscale.files import exists

LOCAL = "local"
"""The address that starts a Ray on this machine, which ends with this process."""

PATIENCE = 30.0
"""Seconds that any other address has to answer."""

_PROBE = """
import sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""


class RayCells:
    """Runs each cell as a task of the Ray that this process has joined, and writes its file here.

    `cpus`, `gpus`: what Ray sets aside for each cell; it has as many threads as CPUs.
    """

    def __init__(self, folder: Path, *, cpus: int, gpus: int) -> None:
        import ray

        self.folder = folder
        # A cell whose process died may have lacked memory, and would again: the next run tries it, not Ray.
        remote = ray.remote(max_calls=1, max_retries=0, num_cpus=cpus, num_gpus=gpus)
        self._task, self._cpus, self._gpus = remote(run_on_node), cpus, gpus
        self._running: set[Any] = set()
        self._lock, self._stopped = Lock(), False

    def run(self, spec: Spec) -> str | None:
        """Run one cell to its end; return None, or the words of what went wrong."""
        import ray
        from ray.exceptions import RayError

        with self._lock:
            if self._stopped:
                return "stopped"
            task = self._task.remote(type(spec), spec.to_json(), self._cpus, self._gpus)
            self._running.add(task)
        try:
            result: dict[str, Any] | str = ray.get(task)
        except RayError as error:
            return _describe_loss(error)
        finally:
            with self._lock:
                self._running.discard(task)
        if isinstance(result, str):
            return result
        if result["digest"] != spec.digest:
            return f"its node has another version of chanscale; install {__version__} there"
        spec.write(self.folder, result)
        return None

    def stop(self) -> None:
        """End all cells that run or wait, and start no more."""
        import ray

        with self._lock:
            self._stopped = True
            for task in self._running:
                ray.cancel(task, force=True)


def run_on_node(kind: type[Spec], spec_json: str, cpus: int, gpus: int) -> dict[str, Any] | str:
    """Run one cell, in the process that Ray started for it; return its result, or the words of what went wrong."""
    spec = kind.from_json(spec_json)
    if not exists(spec.data):
        return f"{spec.data} does not exist on the node {platform.node()}; put the images there, at the same path"
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what Ray did not set aside is for others
    torch.set_num_threads(cpus)
    try:
        return spec.run()
    except (ChanscaleError, OSError) as error:
        return one_line(error)
    except Exception:
        return traceback.format_exc().strip()


@contextmanager
def joined_ray(
    address: str, folder: Path, *, jobs: int, cpus: int | None, device: str, tell: Callable[[str], None]
) -> Iterator[RayCells]:
    """Start a Ray here (`local`, for `jobs` cells at a time) or join that at `address`; leave it at the end.

    `cpus`: of each cell; None: here the cores shared among `jobs`, on a cluster one. `tell` hears that no node has
    room for a cell. Raises ConfigError when Ray is not installed, or does not answer.
    """
    ray = _import_ray()
    if cpus is None:
        cpus = max(1, torch.get_num_threads() // jobs) if address == LOCAL else 1
    gpus = int(device in ("cuda", "gpu") or (device == "auto" and torch.cuda.is_available()))
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Results are small: the least that Ray takes is more than they need.
        options |= {"num_cpus": jobs * cpus, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    else:
        _require_answer(address)
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises whatever its layers raise
        raise _unusable(address, one_line(error)) from error
    try:
        if not any(_has_room(node, cpus, gpus) for node in ray.nodes()):
            tell(f"warning: no node of {address} has {cpus} CPUs and {gpus} GPUs; cells wait until one does")
        yield RayCells(folder, cpus=cpus, gpus=gpus)
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed here: pip install 'chanscale[ray]'"
        ) from error
    return ray


def _require_answer(address: str) -> None:
    """Raise ConfigError unless this process could join a Ray at `address`.

    Another one tries it: where nothing answers, Ray goes on for minutes, and cannot be interrupted.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, address],  # -P: a ray.py in the working folder is not run
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _unusable(address, f"nothing answers within {PATIENCE:g} seconds") from error
    if done.returncode:
        raise _unusable(address, (done.stderr.strip().splitlines() or ["Ray broke down"])[-1])


def _unusable(address: str, reason: str) -> ConfigError:
    advice = f"check it, or use --ray {LOCAL}; a cluster with tokens wants RAY_AUTH_MODE=token"
    return ConfigError(f"--ray {address} cannot be used ({reason[:200].rstrip('.')}); {advice}")


def _has_room(node: dict[str, Any], cpus: int, gpus: int) -> bool:
    has: dict[str, float] = node["Resources"]
    return node["Alive"] and has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus


def _describe_loss(error: Exception) -> str:
    """Return Ray's words, and a last line that says what they come to."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):  # all that `run_on_node` meets it returns: it could not be loaded
        reason = str(error).strip().splitlines()[-1]
        return f"{error}\nits node cannot run it ({reason}); install chanscale {__version__} there"
    return f"{error}\nRay lost the process ({type(error).__name__}); it may have lacked memory"
