"""Every error that chanscale raises on purpose.

ChanscaleError
├── ConfigError                 an option is wrong, or two contradict each other
├── DataError                   the images, their labels or their table are not usable
│   ├── UnreadableImageError    one image cannot be decoded, or has the wrong channels
│   └── SplitError              no honest split exists, or a group stands on two sides
├── WeightsError                pretrained weights are not to be had
│   └── DigestError             weights were found, but are not the published ones
├── ModelError                  the network cannot be scaled or pruned
│   ├── UnsupportedTopologyError
│   ├── EmptySelectionError     a selection would remove nothing, or all of a layer
│   ├── InexactRemovalError     the pruned network differs from the masked one
│   └── InexactExportError      what was exported computes something else
├── BudgetError                 the budget cannot be met on this network
├── TrainingError               training broke down (a loss that is not finite)
│   └── LostProcessError        another process of the job is gone; what was reached is kept
└── ArtifactError               a run folder or a model file is missing, foreign or damaged

The command line catches ChanscaleError once, prints its one line and exits with 2.
"""

import reprlib

from chanscale.wording import without_controls

MOST = 200
"""Characters of what comes from outside that a message shows."""


class ChanscaleError(Exception):
    """Root of all errors; its message is one line that says what to do."""


class ConfigError(ChanscaleError):
    """An option is wrong, or two options contradict each other."""


class DataError(ChanscaleError):
    """The images, their labels or their table are not usable."""


class UnreadableImageError(DataError):
    """One image cannot be decoded, or has the wrong number of channels."""


class SplitError(DataError):
    """No honest split exists, or a group stands on two sides of one."""


class WeightsError(ChanscaleError):
    """Pretrained weights are not to be had."""


class DigestError(WeightsError):
    """Weights were found, but they are not the published ones."""


class ModelError(ChanscaleError):
    """The network cannot be scaled or pruned."""


class UnsupportedTopologyError(ModelError):
    """The network is not one whose channels this version can trace."""


class EmptySelectionError(ModelError):
    """A selection would remove nothing although something was asked for, or all of a layer."""


class InexactRemovalError(ModelError):
    """The pruned network differs from the masked one."""


class InexactExportError(ModelError):
    """What was exported computes something else than the model."""


class BudgetError(ChanscaleError):
    """The budget cannot be met on this network."""


class TrainingError(ChanscaleError):
    """Training broke down."""


class LostProcessError(TrainingError):
    """Another process of the same job is gone; the run can be resumed."""


class ArtifactError(ChanscaleError):
    """A run folder or a model file is missing, foreign or damaged."""


def one_line(error: BaseException) -> str:
    """Return the error's words without line breaks, or its kind when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def clip(text: str) -> str:
    """Return a name or a message from outside as a line can bear it: of a long one the start, without line breaks."""
    return without_controls(text if len(text) <= MOST else f"{text[:MOST]}...")


def brief(value: object) -> str:
    """Return the repr of a value from outside, clipped; of one that is large or nested, no more is looked at."""
    try:
        return clip(_REPR.repr(value))
    except ValueError:  # a whole number of too many digits to print
        return f"a large {type(value).__name__}"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, MOST, MOST


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an error says that the machine, or a device of it, has not enough memory.

    PyTorch says so with a RuntimeError; only that of a device has a class of its own.
    """
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in words)
    )
