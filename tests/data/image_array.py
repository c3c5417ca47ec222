"""A picture in memory as an image source."""

from dataclasses import dataclass

import numpy as np
import PIL.Image


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Pixels u1 ``[H, W, 3]``, upright RGB."""

    array: np.ndarray
    name: str

    def load(self) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.array)
