"""How volumes are moved: rotations, zoom, mirror and shift as maps for `affine_grid`."""

import torch
from torch import Tensor


def place_volumes(angles: Tensor, magnified: Tensor, mirrored: Tensor, shifts: Tensor) -> Tensor:
    """Return the maps (N, 3, 4) from places in the result to places in the volume, both in [-1, 1].

    `angles`: (N, 3), radians about the axes of W, H and D, one after the other. `magnified`: (N,). `mirrored`: (N,),
    along D, which runs from left to right in a cube that is oriented to RAS. `shifts`: (N, 3), along W, H, D.
    """
    turned = _turn(angles[:, 0], 1, 2) @ _turn(angles[:, 1], 0, 2) @ _turn(angles[:, 2], 0, 1)
    sides = torch.ones(len(angles), 3, device=angles.device)
    sides[:, 2] = torch.where(mirrored, -1.0, 1.0)
    maps = turned * sides[:, None] / magnified[:, None, None]
    return torch.cat([maps, shifts[:, :, None]], 2)


def _turn(angles: Tensor, one: int, other: int) -> Tensor:
    """Return the rotations (N, 3, 3) by `angles` (N,) in the plane of two axes."""
    found = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
    found[:, one, one] = found[:, other, other] = angles.cos()
    found[:, one, other], found[:, other, one] = -angles.sin(), angles.sin()
    return found
