"""Processes of cells, on the tiny backbone, with two methods that fail and one that takes long."""

import os
import signal
import sys
import time

import tiny_backbone
from chanscale.baselines import BASELINES
from chanscale.comparison import cell_process
from chanscale.errors import TrainingError

PROGRAM = (sys.executable, __file__)


def break_down(*_):
    raise TrainingError("the loss became nan;\n use a lower --head-lr")


def be_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def take_long(*_):
    time.sleep(600)


METHODS = {"broken": break_down, "killed": be_killed, "endless": take_long}


def register(setitem=dict.__setitem__, setattribute=setattr) -> None:
    """Make all of it known, with pytest's monkeypatch or for the whole process."""
    tiny_backbone.register(setitem, setattribute)
    for name, method in METHODS.items():
        setitem(BASELINES, name, method)


def register_healed() -> None:
    """The same, with a method that kills no more."""
    register()
    BASELINES["killed"] = BASELINES["head"]


if __name__ == "__main__":
    register()
    cell_process.main()
