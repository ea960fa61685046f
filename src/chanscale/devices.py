"""Device and precision, through Lightning Fabric."""

import copy
import logging
import os
import sys
from functools import cache
from time import perf_counter

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.launchers import subprocess_script as launchers
from torch.nn import functional as F

from chanscale.channels import Model
from chanscale.config import FitConfig, FixedPrecision
from chanscale.errors import ConfigError, one_line
from chanscale.modes import device_of
from chanscale.team import is_joined, team_size

# Fabric says on stderr, each time, which precision it uses. The level of this logger of Fabric's alone is set, and not
# that of the one above it, which others may hear; nor is one that the user has set.
_chatty = logging.getLogger("lightning_fabric.utilities.rank_zero")
if _chatty.level == logging.NOTSET:
    _chatty.setLevel(logging.WARNING)


def _own_device(config: FitConfig) -> int | list[int]:
    """Return the device of this process: of several GPUs that with its number."""
    cuda = config.device in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    return [int(os.environ.get("LOCAL_RANK", 0))] if cuda and team_size() > 1 else 1


def make_fabric(config: FitConfig) -> Fabric:
    """Return the Fabric that moves, casts and backpropagates for a run. Raises ConfigError."""
    precision = find_precision(config)
    try:
        return Fabric(accelerator=config.device, devices=_own_device(config), precision=precision)
    except Exception as error:  # Fabric raises whatever its plugin for the device raises
        reason = one_line(error)
        raise ConfigError(f"device={config.device!r} cannot be used ({reason}); use --device cpu") from error


def join_team(config: FitConfig) -> None:
    """Start the other processes of the job, or join those that are there, where `config` or torchrun has several.

    Returns when all are there. A process that ends before its time ends the others. Raises ConfigError.
    """
    devices, nodes = _count_processes(config)
    if devices * nodes == 1 or is_joined():
        return
    launcher = logging.getLogger(launchers.__name__)
    launcher.setLevel(logging.INFO)
    launcher.handlers, launcher.propagate = [_ToStandardError()], False
    try:
        fabric = Fabric(accelerator=config.device, devices=devices, num_nodes=nodes, strategy="ddp")
        fabric.launch()
    except Exception as error:  # Fabric raises whatever its launcher, and torch.distributed, raise
        raise ConfigError(
            f"devices={devices} and nodes={nodes} cannot be had ({one_line(error)[:200]}); use one, or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK"
        ) from error


def _count_processes(config: FitConfig) -> tuple[int, int]:
    """Return how many processes a machine has, and how many machines there are: torchrun knows, else `config` says."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return config.devices, config.nodes


class _ToStandardError(logging.Handler):
    """Says why the job ends: Fabric logs it where nobody hears, and kills the process that it tells it to."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, whatever the level."""
        del record
        sys.stderr.write(
            "error: a process of the job ended before the others; see what it said, and go on with --resume\n"
        )
        sys.stderr.flush()


def on_device(model: Model, config: FitConfig) -> Model:
    """Return `model`, or a copy of it on the device of the run where it lies on another."""
    device = make_fabric(config).device
    return model if device_of(model) == device else copy.deepcopy(model).to(device)


def find_precision(config: FitConfig) -> FixedPrecision:
    """Return the precision that `config` names, or the fastest one where it says `auto`."""
    return fastest_precision(config.device) if config.precision == "auto" else config.precision


@cache
def fastest_precision(device: str) -> FixedPrecision:
    """Return `bf16-mixed` if this machine computes it faster than fp32, measured, else `32-true`.

    Processors without bf16 instructions emulate them, several times slower; the gap is wide either way. Measured
    once in a process.
    """
    cuda = device in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if device == "mps" or (device == "auto" and not cuda and torch.backends.mps.is_available()):
        return "32-true"
    where = torch.device("cuda" if cuda else "cpu")
    if cuda:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fp32, bf16 = _time_convolution(torch.float32, where), _time_convolution(torch.bfloat16, where)
    return "bf16-mixed" if bf16 < 0.8 * fp32 else "32-true"


@torch.no_grad()
def _time_convolution(dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of the fastest of five runs of one middle layer of VGG16."""
    x = torch.ones(2, 256, 28, 28, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(256, 256, 3, 3, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        began = perf_counter()
        F.conv2d(x, weight, padding=1)
        seconds.append(perf_counter() - began)
    return min(seconds)
