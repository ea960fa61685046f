"""The process of one cell: `python -m chanscale.comparison.cell_process FOLDER`, with its spec on stdin."""

import os
import signal
import sys
from pathlib import Path
from threading import Thread

from chanscale.comparison.cells import CellSpec
from chanscale.comparison.processes import Spec
from chanscale.errors import ChanscaleError, one_line


def main(kind: type[Spec] = CellSpec) -> None:
    """Run the cell, or what else the spec is of, and write its file; exit with an error of ours in one line."""
    # Ctrl-C goes to every process of the terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = kind.from_json(sys.stdin.buffer.readline())
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        spec.write(Path(sys.argv[1]), spec.run())
    except (ChanscaleError, OSError) as error:
        sys.exit(f"{one_line(error)}")


def _end_with_parent() -> None:
    """Wait until stdin closes, as it does when the parent ends, even if it is killed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
