"""What a caller may hear while long work goes on; the command line draws it, the library is silent."""

from typing import Any

from chanscale.schedule import Moment


class Watcher:
    """Hears of progress and does nothing; override what you want to show."""

    def on_step(self, what: str, done: int, total: int) -> None:
        """Hear that `done` of `total` units of some work, such as `decoding images`, are done."""

    def on_finding(self, finding: str) -> None:
        """Hear what was found out, in a line, such as how this machine trains fastest."""

    def on_batch(self, moment: Moment, done: int, total: int, loss: float) -> None:
        """Hear of a batch: `done` of `total` in this epoch, and its loss."""

    def on_epoch(self, moment: Moment, row: dict[str, Any]) -> None:
        """Hear of an epoch: its row of the history."""
