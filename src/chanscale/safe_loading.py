"""Read files of tensors without running what they bring along."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bare_tensors() -> Iterator[None]:
    """Let torch.load read tensors alone, whoever calls it: the libraries' files are pickles, which could run code."""
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
