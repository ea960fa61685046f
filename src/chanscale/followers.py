"""Processes that were started to share the work of another: they write nothing, and speak when something goes wrong."""

import os

_NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK")
"""Where torchrun and Lightning Fabric leave the number of a process, of a process of one machine, of a machine."""


def is_follower() -> bool:
    """Whether this process is not the first of its job, by what started it; read before anything heavy is imported."""
    return any(os.environ.get(name, "0") != "0" for name in _NUMBERS)


def sign() -> str:
    """Return what goes before the words of this process, where it is not the first of its job."""
    told = [f"{name.lower().replace('_', ' ')} {os.environ[name]}" for name in _NUMBERS if name in os.environ]
    return f"[{', '.join(told)}] " if is_follower() else ""
