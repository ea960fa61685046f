"""Two pictures laid on each other, and how much of the one is then the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLUR = 1.0
_STEPS = 8
_RIDGE = 1e-3
"""Of the curvature: a picture of stripes does not say how far to move along them."""
_FAR = 0.1
"""What a step may change: where little overlaps, it would leap away."""
_FLAT = 0.02
"""Least variance of a tile to compare; all of a leveled picture has about 1."""
_COVERED = 0.75


def align(fixed: Tensor, moving: Tensor, warp: Tensor) -> Tensor:
    """Return the affine maps, (N, 2, 3), under which `moving` fits `fixed` best; pictures are (N, S, S).

    A map takes places of `fixed` to those of `moving`, in [-1, 1]. Gauss-Newton from `warp`, over the pixels that both
    have; it sees a few pixels far, so start on small pictures. Lucas and Kanade 1981.
    """
    one, other = smooth(fixed, _BLUR), smooth(moving, _BLUR)
    down, across = torch.gradient(other, spacing=2 / other.shape[-1], dim=(1, 2))
    slopes = torch.stack([other, across, down], dim=1)
    for _ in range(_STEPS):
        warp = warp + _step(one, slopes, warp)
    return warp


def overlay(fixed: Tensor, moving: Tensor, warp: Tensor) -> tuple[Tensor, Tensor]:
    """Return `moving` (N, S, S) as it lies on `fixed`, and which pixels it covers."""
    warped, inside = _sample(moving[:, None], warp, fixed.shape[-1])
    return warped[:, 0], inside


def agreement(fixed: Tensor, laid: Tensor, inside: Tensor, *, tile: int) -> Tensor:
    """Return the correlation of each tile of two pictures, (N, tiles); nan where they are flat or do not overlap."""
    one, other, count = (_tiles(part, tile) for part in (fixed, laid, inside.to(fixed.dtype)))
    weight = count / count.sum(-1, keepdim=True).clamp_min(1)
    one, other = (part - (weight * part).sum(-1, keepdim=True) for part in (one, other))
    first, second, both = ((weight * a * b).sum(-1) for a, b in ((one, one), (other, other), (one, other)))
    useless = (first < _FLAT) | (second < _FLAT) | (count.mean(-1) < _COVERED)
    return torch.where(useless, torch.nan, both / (first * second).sqrt().clamp_min(_FLAT))


def smooth(pictures: Tensor, blur: float) -> Tensor:
    """Return pictures (N, S, S) behind a Gaussian of `blur` pixels."""
    reach = int(3 * blur + 0.5)
    taps = torch.exp(-(torch.arange(-reach, reach + 1, dtype=pictures.dtype) ** 2) / (2 * blur * blur))
    taps = taps / taps.sum()
    padded = F.pad(pictures[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps[None, None, None]), taps[None, None, :, None])[:, 0]


def _step(fixed: Tensor, slopes: Tensor, warp: Tensor) -> Tensor:
    """Return the change of the maps, (N, 2, 3), that fits best to first order."""
    sampled, inside = _sample(slopes, warp, fixed.shape[-1])
    value, across, down = sampled.flatten(2).unbind(1)
    mask = inside.flatten(1).to(fixed.dtype)
    places = _places(fixed.shape[-1], fixed.dtype)
    jacobian = torch.cat([across[:, None] * places, down[:, None] * places], dim=1) * mask[:, None]
    gain = (mask * value * fixed.flatten(1)).sum(1) / (mask * value * value).sum(1).clamp_min(1e-6)
    error = (fixed.flatten(1) - gain[:, None] * value) * mask
    curvature = jacobian @ jacobian.transpose(1, 2)
    ridge = _RIDGE * curvature.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
    curvature = curvature + ridge[:, None, None] * torch.eye(6, dtype=fixed.dtype)
    change: Tensor = torch.linalg.solve(curvature, jacobian @ error[:, :, None])
    return change.reshape(-1, 2, 3).clamp(-_FAR, _FAR)


def _sample(pictures: Tensor, warp: Tensor, side: int) -> tuple[Tensor, Tensor]:
    grid = F.affine_grid(warp, [len(warp), 1, side, side], align_corners=False)
    sampled = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return sampled, (grid.abs() <= 1).all(-1)


def _places(side: int, dtype: torch.dtype) -> Tensor:
    """Return x, y and 1 of each pixel, (3, S * S)."""
    along = (torch.arange(side, dtype=dtype) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(1)


def _tiles(pictures: Tensor, tile: int) -> Tensor:
    """Return the pixels by tile: (N, S, S) to (N, tiles, pixels)."""
    return F.unfold(pictures[:, None], tile, stride=tile).transpose(1, 2)
