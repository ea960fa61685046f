"""How much of an image there is at each coarseness: its power spectrum, in half rings."""

import math

import torch
from torch import Tensor

from chanscale.novelty.facts import NOTHING, to_grey

RINGS = 12
COARSEST = 1.5
"""Cycles an image where the first ring begins: what is slower is where an image is bright, which a thumbnail shows."""

OUTSIDE = -1


def measure_spectra(images: Tensor) -> Tensor:
    """Return ln of the mean power of square images (N, C, S, S) in parts of their spectrum, (N, P), float64.

    The parts are those of `place_frequencies`; P is 2 * `RINGS`, or fewer where a small S leaves some empty. White
    noise has its variance in each. A Hann window hides that opposite borders of an image do not meet.
    """
    grey = to_grey(images).double()[:, 0]
    hann = torch.hann_window(grey.shape[-1], periodic=False, dtype=grey.dtype)
    window = hann[:, None] * hann
    centred = grey - (grey * window).sum((1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2(centred * window).abs().square() / window.square().sum()
    places = place_frequencies(grey.shape[-1])
    inside = places != OUTSIDE
    counts = torch.bincount(places[inside], minlength=2 * RINGS)
    # No product of matrices: its last bits hang on the batch.
    sums = power.new_zeros(len(grey), 2 * RINGS).index_add_(1, places[inside], power[:, inside])
    filled = counts > 0
    spectra: Tensor = (sums[:, filled] / counts[filled] + NOTHING**2).log()
    return spectra


def place_frequencies(size: int) -> Tensor:
    """Return the part of each frequency of an image, (size, size): 2 * ring, and 1 more where it is rather sideways.

    The rings, from coarse to fine, are equally wide in ln of the frequency. `OUTSIDE`: coarser than all, or diagonal.
    """
    along = torch.fft.fftfreq(size, dtype=torch.float64).abs()
    down, across = along[:, None].expand(size, size), along.expand(size, size)
    first, last = math.log(COARSEST / size), math.log(math.sqrt(0.5))
    ring = ((torch.hypot(down, across).log() - first) / (last - first) * RINGS).floor().clamp(max=RINGS - 1)
    outside = (ring < 0) | (down == across)
    return torch.where(outside, OUTSIDE, 2 * ring + (across > down)).long()
