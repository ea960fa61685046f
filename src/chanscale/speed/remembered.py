"""What was found on this machine, kept in the user's cache: the same command then computes alike each time."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from chanscale import __version__
from chanscale.errors import WeightsError, one_line
from chanscale.files import read_json, to_json, write_atomically
from chanscale.speed.choice import Calibration
from chanscale.weights import cache_folder

FORMAT = "chanscale-speed/1"

_log = logging.getLogger(__name__)


def remember(facts: Mapping[str, Any], found: Calibration) -> None:
    """Keep what was `found` where `facts` hold; where that cannot be written, warn."""
    try:
        path = path_of(facts)
    except WeightsError as error:
        _log.warning("the speed that was found is not kept: %s", error)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "facts": dict(facts), "found": found.to_dict()}
        write_atomically(path, to_json(content) + "\n")
    except OSError as error:
        _log.warning(
            "cannot write %s (%s): the same command may find another speed, and so round in another way; set "
            "CHANSCALE_HOME to a folder that can be written, or use --speed off", path, one_line(error),
        )  # fmt: skip


def recall(facts: Mapping[str, Any]) -> Calibration | None:
    """Return what was found where `facts` held, or None: also where its file is damaged."""
    try:
        content = read_json(path_of(facts))
        if content["format"] != FORMAT or content["facts"] != dict(facts):
            return None
        return Calibration.from_dict(content["found"])
    except (WeightsError, OSError, ValueError, LookupError, TypeError):
        return None


def path_of(facts: Mapping[str, Any]) -> Path:
    """Return the file for `facts`, which need not exist."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "speed" / f"{digest[:16]}.json"


def describe_processors(device: torch.device) -> dict[str, Any]:
    """Return what computes, and by which programs: what a speed is true of."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": _name_processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "gpu": gpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "chanscale": __version__,
    }  # fmt: skip


def _name_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # there is none but on Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
