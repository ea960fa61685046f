"""One NIfTI file to a cube of 16-bit voxels, oriented to RAS, by nibabel and the transforms of MONAI.

A header may hold names of a patient (`db_name`, `descrip`, extensions): nothing of it is kept but the affine, and words
of nibabel are not passed on.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from chanscale.errors import ConfigError, UnreadableImageError

if TYPE_CHECKING:
    from torch import Tensor

VOLUME_SUFFIXES = frozenset({".nii", ".nii.gz"})
MAX_VOXELS = 2**28
"""Of a file, or of a volume at the spacing that is asked for: about 1.6 GB while it is read."""
PERCENTILES = (0.5, 99.5)
"""What becomes black and white where no window is given."""

_FULL_RANGE = 65535
_WANTED = "wanted a NIfTI volume, grey, of three axes"
_MAX_HEADER = 2**24
_QUIET = "nibabel.global"


@dataclass(frozen=True)
class VolumeSpace:
    """How volumes are brought to one space: their axes, how far apart voxels are, and which values are shown.

    `orientation`: what the axes of (D, H, W) run to: right, anterior, superior. `spacing`: mm between voxels, a volume
    then being cut or padded to the cube around its centre; None: the whole is squashed to the cube, whatever its
    extent. `window`: the values that become black and white; None: the 0.5th and 99.5th percentile of each volume.
    Raises ConfigError.
    """

    spacing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    window: (
        tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]]
        | None
    ) = None
    orientation: Literal["RAS"] = "RAS"

    def __post_init__(self) -> None:
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ConfigError(f"`window` must be a lower and a higher value. Got {self.window} instead.")


def is_volume(path: Path | str) -> bool:
    """Tell by its name whether a file is a volume."""
    return str(path).lower().endswith(tuple(VOLUME_SUFFIXES))


def require_extra() -> None:
    """Raise ConfigError where MONAI or nibabel is not installed."""
    try:
        import monai  # noqa: F401
        import nibabel  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"volumes need {error.name}: pip install 'chanscale[monai]'") from error


def read_volume(path: Path, *, size: int, space: VolumeSpace, name: str | None = None) -> NDArray[np.uint16]:
    """Decode one NIfTI file: (1, size, size, size), 0 to 65535; its axes run right, anterior and superior.

    Values outside of the window are clipped, the others keep their order. Where voxels get larger they are means, else
    linear in between. A volume that has the size, or size and spacing, is not filtered. `name` stands for the
    path in errors. Raises UnreadableImageError, and nothing else, for a file that cannot be used.
    """
    label = name or str(path)
    try:
        return _decode(path, size, space)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{label}: {error}") from error
    # nibabel raises nearly anything on a damaged file. Only the kind is told: the words may quote a header.
    except Exception as error:
        raise UnreadableImageError(
            f"{label}: {_WANTED}, got one that cannot be decoded ({type(error).__name__}). Get it again, or remove it."
        ) from None


def middle_slice(volume: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return the axial slice (1, H, W) in the middle of (1, S, S, S), anterior on top and right on the left."""
    cut = volume[:, :, :, volume.shape[3] // 2]
    return cut.swapaxes(1, 2)[:, ::-1, ::-1]


def _decode(path: Path, size: int, space: VolumeSpace) -> NDArray[np.uint16]:
    values, affine = _load(path)
    shown = _show(values, space)
    cube = _fit(_orient(shown, affine, space), size, space).numpy()
    voxels: NDArray[np.uint16] = np.rint(cube).clip(0, _FULL_RANGE).astype(np.uint16)
    return voxels


def _load(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the values (X, Y, Z), as the slope and intercept of the file make them, and its affine (4, 4)."""
    # Not MONAI's reader: where the sform does not fit the voxel sizes, it takes a qform that the file calls unknown.
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    if path.stat().st_size == 0:
        raise UnreadableImageError(f"{_WANTED}, got an empty file of 0 bytes. Get it again, or remove it.")
    logging.getLogger(_QUIET).setLevel(logging.CRITICAL + 1)
    _refuse_long_header(path)
    try:
        image: Any = nibabel.load(path, mmap=False)
    except ImageFileError:
        raise UnreadableImageError(
            f"{_WANTED}, got something else, whatever the name says. Convert it, or remove it."
        ) from None
    _refuse(image)
    values = np.asanyarray(image.dataobj)
    _refuse_values(values)
    return values.reshape(image.shape[:3]), np.asarray(image.affine, dtype=np.float64)


def _refuse_long_header(path: Path) -> None:
    """Stop at a file whose header would be unpacked without bounds; what is no NIfTI is left to the reader."""
    from nibabel import Nifti1Header, Nifti2Header
    from nibabel.openers import Opener

    with Opener(path) as file:
        head = file.read(540)
    for kind in (Nifti1Header, Nifti2Header):
        if kind.may_contain_header(head):
            begin = float(kind(head[: kind.template_dtype.itemsize], check=False)["vox_offset"])
            if not begin <= _MAX_HEADER:
                raise UnreadableImageError(
                    f"wanted a header of at most {_MAX_HEADER:,} bytes, got {begin:,.0f}. Convert the volume anew."
                )


def _refuse(image: Any) -> None:
    """Stop, by the header alone, at what would be read wrongly, or would not fit in memory."""
    from nibabel import Nifti1Image, Nifti2Image

    if type(image) not in (Nifti1Image, Nifti2Image):
        raise UnreadableImageError(f"{_WANTED}, got a NIfTI file of another kind. Convert it, or remove it.")
    shape = image.shape
    if any(length != 1 for length in shape[3:]):
        raise UnreadableImageError(
            f"{_WANTED}, got {len(shape)} axes {shape}. Save each time or channel in a file of its own."
        )
    if len(shape) < 3 or min(shape) < 1 or min(shape[:3]) < 2:
        raise UnreadableImageError(
            f"{_WANTED}, got {shape} voxels, which is no volume. Save a slice as an image."
        )
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise UnreadableImageError(
            f"wanted at most {MAX_VOXELS:,} voxels, got {shape}. Make it smaller first."
        )
    if image.get_data_dtype().kind not in "iuf":
        raise UnreadableImageError(
            f"{_WANTED}, got voxels of {image.get_data_dtype()}. Convert it to whole numbers or float32."
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
        raise UnreadableImageError(
            "wanted an affine that tells where each voxel is, got one that does not. Set it."
        )


def _refuse_values(values: NDArray[Any]) -> None:
    if lost := int(values.size - np.isfinite(values).sum()):
        raise UnreadableImageError(
            f"wanted finite values, got {lost:,} voxels that are NaN or infinite. Give them a value."
        )


def _show(values: NDArray[Any], space: VolumeSpace) -> NDArray[np.float32]:
    """Return the values in the window as 0 to 65535, the others clipped; a volume of one value is black."""
    # Percentiles of a volume that is nearly all background are both that of the background.
    low, high = space.window or np.percentile(values, PERCENTILES).tolist()
    if not low < high:
        low, high = float(values.min()), float(values.max())
    if not low < high:
        return np.zeros(values.shape, np.float32)
    # In float64: whole numbers may be too large for float32.
    shares = (values.astype(np.float64) - low) / (high - low)
    shown: NDArray[np.float32] = (shares.clip(0, 1) * _FULL_RANGE).astype(np.float32)
    return shown


def _orient(values: NDArray[np.float32], affine: NDArray[np.float64], space: VolumeSpace) -> "Tensor":
    """Return (1, X, Y, Z) whose axes run as `space` says, with a diagonal affine that tells the voxels' size."""
    import torch
    from monai.data import MetaTensor
    from monai.data.utils import affine_to_spacing
    from monai.transforms import Orientation

    volume = MetaTensor(torch.from_numpy(np.ascontiguousarray(values))[None], affine=torch.from_numpy(affine))
    turned: Any = Orientation(axcodes=space.orientation, labels=None)(volume)
    # Rounded: in a file of another axis order the same size differs in its last bits.
    sizes = np.round(np.asarray(affine_to_spacing(turned.affine)), 4)
    turned.affine = torch.diag(torch.tensor([*sizes, 1.0], dtype=torch.float64))
    return turned  # type: ignore[no-any-return]


def _fit(volume: "Tensor", size: int, space: VolumeSpace) -> "Tensor":
    from monai.transforms import Resize, ResizeWithPadOrCrop

    cube = (size, size, size)
    if space.spacing is None:
        return _plain(Resize(cube, mode="trilinear")(_shrink(volume, cube)))
    return _plain(ResizeWithPadOrCrop(cube, mode="constant")(_respace(volume, space.spacing)))


def _respace(volume: Any, spacing: float) -> "Tensor":
    """Return (1, X, Y, Z) with voxels of `spacing` mm."""
    from monai.transforms import Spacing

    sizes = volume.affine.diagonal()[:3].tolist()
    wanted = [length * each / spacing for length, each in zip(volume.shape[1:], sizes, strict=True)]
    if np.prod(wanted) > MAX_VOXELS:
        raise UnreadableImageError(
            f"wanted at most {MAX_VOXELS:,} voxels, got {np.prod(wanted):,.0f} at a spacing of {spacing:g} mm. "
            "Take a larger one."
        )
    shrunk = _shrink(volume, [math.ceil(length) for length in wanted])
    spaced: Tensor = Spacing((spacing,) * 3, mode="bilinear", padding_mode="border")(shrunk)
    return spaced


def _shrink(volume: "Tensor", shape: Sequence[int]) -> "Tensor":
    """Return the volume with no axis longer than `shape`: against aliasing, means over the voxels that become one."""
    from monai.transforms import Resize

    # Not the Gaussian that MONAI has for this: it takes what lies outside for black, and darkens the border.
    least = [min(pair) for pair in zip(volume.shape[1:], shape, strict=True)]
    shrunk: Tensor = Resize(least, mode="area")(volume)
    return shrunk


def _plain(volume: Any) -> "Tensor":
    """Return the numbers alone, without what MONAI notes beside them."""
    bare: Tensor = volume.as_tensor()
    return bare
