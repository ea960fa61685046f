"""Images of patients for small runs that have a report, with names that would do harm as markup."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.metrics import estimate
from chanscale.report_page import curves

EVIL = ("clear & <b>well</b>", "</script><script>alert('1')</script>")


def draw(classes=("no", "yes"), *, patients=24, size=32, name="{patient:03}_{film}.png") -> ImageSet:
    """Return two images of each patient: noise, which is a little brighter for the later classes."""
    rng = np.random.default_rng(5)
    records = []
    for patient in range(patients):
        label = patient % len(classes)
        for film in range(2):
            pixels = rng.integers(0, 200, (size, size)).astype(np.uint8)
            pixels[: size // 2] += np.uint8(12 * label)
            title = name.format(patient=patient, film=film)
            records.append(ImageRecord(title, label, f"patient-{patient:03}", pixels=pixels))
    return ImageSet(Path("drawn"), tuple(classes), tuple(records))


@contextmanager
def few_draws() -> Iterator[None]:
    """Let intervals come from few draws: thousands of them, for each small run, would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(estimate.__kwdefaults__, "resamples", 40)
        patch.setattr(curves, "RESAMPLES", 40)
        yield
