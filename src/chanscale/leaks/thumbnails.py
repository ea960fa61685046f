"""What two images are compared by: small grey pictures whose contrast is the same everywhere."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from chanscale.data.loading import BatchLoader, DecodedImages, Progress

SIDE = 64
"""Pixels: fine enough to tell two films of one patient apart, coarse enough for what JPEG leaves of an image."""
_BATCH = 64
_NOISE = 4 / 255
"""Contrast below this is noise of the file: it is not stretched, so that a black border stays flat."""

Pictures = NDArray[np.float32]


def thumbnails(images: DecodedImages, *, progress: Progress | None = None) -> NDArray[np.uint8]:
    """Return every image as grey levels, shape (N, SIDE, SIDE); images of any size will do."""
    loader = BatchLoader(images, range(len(images)), batch_size=_BATCH)
    small = np.empty((len(images), SIDE, SIDE), dtype=np.uint8)
    for batch in loader.epoch():
        small[batch.indices.numpy()] = _shrink(batch.images)
        if progress:
            progress(int(batch.indices[-1]) + 1, len(images))
    return small


def level_contrast(small: NDArray[np.uint8], *, reach: float) -> Pictures:
    """Return thumbnails, (N, SIDE, SIDE), less their local mean and divided by their local contrast.

    Brightness, contrast and gamma then hardly count. `reach`: the standard deviation of `local`, in pixels.
    """
    around = (0, reach, reach)
    levels = small.astype(np.float32) / 255
    detail = levels - gaussian_filter(levels, around)
    contrast = np.sqrt(gaussian_filter(detail * detail, around))
    leveled: Pictures = detail / (contrast + np.float32(_NOISE))
    return leveled


def _shrink(images: torch.Tensor) -> NDArray[np.uint8]:
    """Bring images (N, C, H, W) in [0, 1] to grey levels (N, SIDE, SIDE)."""
    grey = images.mean(dim=1, keepdim=True)
    if grey.shape[-1] != SIDE:
        grey = F.interpolate(grey, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    levels: NDArray[np.uint8] = (grey[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return levels
