"""Numbers and names as people read them, and what all results say."""

import unicodedata
from pathlib import Path

NOTICE = "Research software: not a medical device, and no output of it is a diagnosis."

_CONTROLS = ("Cc", "Cf", "Zl", "Zp")  # Cf turns the direction of writing, among others


def printable(name: str) -> str:
    """Return a name that any output can take: bytes of a file name that are no UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode()


def without_controls(text: str) -> str:
    """Return a line with control characters escaped: the name of a file could move the cursor, or forge a line."""
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _CONTROLS else c for c in text)


def without_folder(network: str) -> str:
    """Return the name of a network to show: of `LIBRARY:FOLDER`, not where the folder lay."""
    library, colon, place = network.partition(":")
    return f"{library}:{Path(place).name}" if colon and Path(place).is_absolute() else network


def shorten(number: float) -> str:
    """Return a large number with three digits and a prefix, such as `14.7 M`; a small one as it is."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {prefix}"
    return f"{number:.0f}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural where it is not 1: `1 trial`, `30 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def are_there(number: int) -> str:
    """Return of how many parts of the work nothing is to be done: `1 is there`, `30 are there`."""
    return f"{number:,} {'is' if number == 1 else 'are'} there"


def percent(share: float) -> str:
    """Return a share in percent, with one digit: `96.4 %`."""
    return f"{100 * share:.1f} %"


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds, with three digits or all before the point: `45.9`, `1,250`."""
    count = 1000 * seconds
    return f"{count:,.0f}" if count >= 99.95 else f"{count:#.3g}".rstrip(".")


def size_on_disk(count: float) -> str:
    """Return a number of bytes: `58.9 MB`."""
    text = shorten(count)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"
