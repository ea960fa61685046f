"""How busy a machine is with other things: speed that is found meanwhile is that of a busy machine."""

from time import process_time

import psutil

from chanscale.team import local_size

IDLE = frozenset({"idle", "iowait", "guest", "guest_nice"})
"""Times in which a processor does nothing, or which Linux counts in others as well."""


class OtherWork:
    """What the processors do beside this job, from when this is made."""

    def __init__(self) -> None:
        self._began = _read_times()

    @property
    def share(self) -> float:
        """The share of all processors' time that other work has taken since, in [0, 1]."""
        busy, every, own = (now - then for now, then in zip(_read_times(), self._began, strict=True))
        # All processes of this job compute alike, and so take as much.
        return min(1.0, max(0.0, busy - own * local_size()) / every) if every > 0 else 0.0


def _read_times() -> tuple[float, float, float]:
    """Return the seconds of all processors together that were busy, and all there were; and those of this process."""
    times = psutil.cpu_times()._asdict()
    busy = sum(seconds for name, seconds in times.items() if name not in IDLE)
    return busy, busy + times["idle"] + times.get("iowait", 0.0), process_time()
