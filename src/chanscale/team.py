"""The processes of one job, through torch.distributed: each computes a share of every batch, and all come to the same.

What is random depends on seeds and places alone, so that what is small is computed by all alike: the head, the penalty,
the selection. Only features and the gradients of what makes them travel. Where there is one process, nothing does.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from chanscale.errors import LostProcessError, TrainingError

T = TypeVar("T")
Indices = Sequence[int] | NDArray[np.integer]

_ALONE = ContextVar("alone", default=False)


def team_size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if _is_team() else 1


def local_size() -> int:
    """Return how many of them are on this machine, as torchrun says; else, at most, all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", team_size()))


def team_rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if _is_team() else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks: number 0."""
    return not is_joined() or dist.get_rank() == 0


def is_joined() -> bool:
    """Whether this process is one of a job of several."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _talking() -> Iterator[None]:
    """Tell of a process that no longer answers. Raises LostProcessError."""
    try:
        yield
    except RuntimeError as error:  # of whatever carries the messages
        raise LostProcessError(
            "another process of the job is gone; see what it said, and go on with --resume"
        ) from error


def _is_team() -> bool:
    return is_joined() and not _ALONE.get()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute by itself what it otherwise would with the others, who do not come along."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@dataclass(frozen=True)
class Portion:
    """The images, of those at `indices`, that this process is to compute; fewer images than processes: all of them."""

    indices: Indices

    @property
    def own(self) -> NDArray[np.integer]:
        """The indices of this process."""
        return np.array_split(np.asarray(self.indices), self._parts)[team_rank() if self._parts > 1 else 0]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (N, ...) of all `indices`, in their order, from the rows of `own` in each process."""
        return torch.cat(_gather(rows)) if self._parts > 1 else rows

    @property
    def _parts(self) -> int:
        return team_size() if len(self.indices) >= team_size() else 1


def own_parts(parts: Sequence[T]) -> list[T]:
    """Return those of the parts of a batch that this process is to compute."""
    return list(parts[team_rank() :: team_size()])


def merge_parts(own: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the features (N, C) of all parts of a batch from those of `own_parts`, in each process.

    A gradient reaches what this process computed; what reaches the others' is theirs.
    """
    if team_size() == 1:
        return torch.cat(list(own))
    width = max(_tell(own[0].shape[1] if own else 0, device=parts[0].device))  # also where none was computed
    mine = torch.cat(list(own)) if own else parts[0].new_zeros((0, width), dtype=torch.float32)
    found: list[Tensor | None] = [None] * len(parts)
    for rank, rows in enumerate(_gather(mine.detach())):
        places = range(rank, len(parts), team_size())
        sizes = [len(parts[place]) for place in places]
        for place, part in zip(places, torch.split(rows, sizes), strict=True):
            found[place] = part
    found[team_rank() :: team_size()] = list(own)
    return torch.cat(cast(list[Tensor], found))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up, in place, the gradients that each process has of `parameters`; without any in all, there is none."""
    parameters = list(parameters)
    if team_size() == 1 or not parameters:
        return
    present = [float(parameter.grad is not None) for parameter in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor(present)])
    with _talking():
        dist.all_reduce(flat)
    *sums, counts = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
    for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).clone() if count else None


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes, in place, the gradients of `parameters` that the first has, so that they stay the same."""
    if team_size() == 1:
        return
    with _talking():
        for parameter in parameters:
            if parameter.grad is not None:
                dist.broadcast(parameter.grad, 0)


def agree(value: T) -> T:
    """Return, in all processes, what the first has for `value`."""
    if team_size() == 1:
        return value
    told = [value]
    with _talking():
        dist.broadcast_object_list(told, 0)
    return told[0]


def require_same(tensors: Iterable[Tensor], what: str) -> None:
    """Raise TrainingError in all processes unless each has the same bits in `tensors`."""
    if team_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    digests: list[str] = [""] * team_size()
    with _talking():
        dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise TrainingError(
            f"the processes no longer have the same {what}; go on with --resume, on machines of one kind"
        )


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if team_size() > 1:
        with _talking():
            dist.barrier()


def _gather(rows: Tensor) -> list[Tensor]:
    """Return the rows (N, ...) of each process, of which one may have more than another."""
    sizes = _tell(len(rows), device=rows.device)
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in sizes]
    with _talking():
        dist.all_gather(found, padded)
    return [one[:size] for one, size in zip(found, sizes, strict=True)]


def _tell(number: int, *, device: torch.device) -> list[int]:
    """Return the number that each process has."""
    own = torch.tensor([number], device=device)
    told = [torch.empty_like(own) for _ in range(team_size())]
    with _talking():
        dist.all_gather(told, own)
    return [int(one) for one in told]
