"""What int8 costs and gains: AUC on labelled images, and latency, each beside that of the graph in fp32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chanscale.artifact import ModelInfo
from chanscale.data.sources import ImageSet
from chanscale.export.agreement import raw_pixels
from chanscale.export.examples import read_whole
from chanscale.export.latency import Timing, draw_pixels, time_in_turns
from chanscale.export.runtime import Floats, open_session, run_session
from chanscale.metrics import mean_auc

Progress = Callable[[str, int, int], None]
SECONDS = 5.0


@dataclass(frozen=True)
class Int8Trial:
    """AUC of both graphs on `images`, the largest change of a probability, and their latency at batch 1."""

    images: int
    auc: float
    auc_fp32: float
    largest_change: float
    latency: Timing
    latency_fp32: Timing


def try_int8(
    graph: bytes, quantised: bytes, images: ImageSet, indices: Sequence[int], info: ModelInfo,
    *, progress: Progress | None = None,
) -> Int8Trial:  # fmt: skip
    """Judge the `quantised` graph beside the one it was made of. Raises UnreadableImageError."""
    runs = {"int8": run_session(open_session(quantised)), "fp32": run_session(open_session(graph))}
    found: dict[str, list[Floats]] = {name: [] for name in runs}
    for done, image in enumerate(read_whole(images, indices), 1):
        for name, run in runs.items():
            found[name].append(run(raw_pixels(image))[0])
        if progress:
            progress("judging int8", done, len(indices))
    scores = {name: np.stack(rows) for name, rows in found.items()}
    labels = images.labels[np.asarray(indices)]
    pixels = draw_pixels(1, info.channels, info.image_size)
    timings = time_in_turns(runs, pixels, seconds=SECONDS)
    return Int8Trial(
        len(labels), mean_auc(scores["int8"], labels), mean_auc(scores["fp32"], labels),
        float(np.abs(scores["int8"] - scores["fp32"]).max()), timings["int8"], timings["fp32"],
    )  # fmt: skip
