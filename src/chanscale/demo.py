"""The demonstration: the whole way on phantoms, which need no download and no licence."""

from dataclasses import dataclass
from pathlib import Path

from chanscale.config import FitConfig

GROUP_PATTERN = r"^(\d+)_"
"""The patient in the file name of a phantom."""


@dataclass(frozen=True)
class Demo:
    """How many phantoms of which size (pixels) are drawn, and what is done with them."""

    images: int
    image_size: int
    config: FitConfig

    def folder_beside(self, out: Path) -> Path:
        """Return where the phantoms go: named after what they are, so that they can serve again."""
        return out.absolute().parent / f"phantoms-{self.images}-{self.image_size}px"


FULL = Demo(400, 128, FitConfig(budget=0.95, group_pattern=GROUP_PATTERN))
"""The defaults: from drawing to figures within 6 minutes on two cores."""

QUICK = Demo(
    120,
    64,
    FitConfig(budget=0.95, group_pattern=GROUP_PATTERN, image_size=64, scale_epochs=3, refine_epochs=2),
)
"""Shows within a minute that all parts work; too little for figures worth reading."""
