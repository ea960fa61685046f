"""Volumes of two classes and a network for them, so small that a fit takes seconds: a bright box in one class."""

from pathlib import Path

import nibabel
import numpy as np
from torch import nn

from chanscale.backbones import BACKBONES, Backbone, Preprocessing

NAME = "tiny@3d"
SHAPE = (12, 14, 10)
AFFINE = np.diag([-1.5, 1.2, 2.0, 1.0])
SECRETS = (b"SECRET^NAME", b"PATIENT7")


class TinyVolumeTrunk(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (4, 8):
            layers += [nn.Conv3d(channels, width, 3, stride=2, padding=1), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.features(x)


def grey() -> Preprocessing:
    return Preprocessing(mean=(0.0,), std=(1.0,))


def register(setitem=dict.__setitem__) -> None:
    """Put the network into the table of backbones; its weights are for `weights.resolve_weights` to tell."""
    size = sum(parameter.numel() for parameter in TinyVolumeTrunk().parameters())
    setitem(BACKBONES, NAME, Backbone(NAME, TinyVolumeTrunk, grey, 2 * size, size, "MIT", "here"))


def save_volume(path: Path, values, affine=AFFINE) -> Path:
    """Write a NIfTI file whose header names a patient."""
    image = nibabel.Nifti1Image(values, affine)
    image.header["descrip"], image.header["db_name"] = SECRETS
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_volumes(root: Path, count: int = 24) -> Path:
    """Write a folder of volumes for each class, no and yes, and return it."""
    rng = np.random.default_rng(0)
    for index in range(count):
        values = rng.integers(-200, 200, SHAPE).astype(np.int16)
        values[4:8, 4:9, 3:7] += 400 * (index % 2)
        save_volume(root / ("yes" if index % 2 else "no") / f"{index}.nii.gz", values)
    return root
