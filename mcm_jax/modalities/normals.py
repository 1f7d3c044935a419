"""Maps of surface normals."""

import jax
import numpy as np

from mcm_jax.errors import expect
from mcm_jax.modalities.kind import averaged
from mcm_jax.modalities.maps import Map


class Normals(Map):
    """Unit vectors v as colours (v + 1) / 2, ``[H, W, 3]``, the first axis to the right.

    A pixel that is no unit vector, black, white or middle grey as backgrounds are, is unknown: its vector is shorter
    than 0.5 or longer than 1.5. The others are averaged and brought to unit length again. A cell is known if half of
    its area is.
    """

    def __post_init__(self):
        super().__post_init__()
        expect(self.channels == 3, f"{self.name}.channels", "3, x, y and z, of the kind normals", self.channels)

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Unit vectors; middle grey, no vector at all, where a cell is unknown."""
        known = unit_vectors(array)[..., None]
        share = averaged(known[..., 0], height, width)[..., None]
        # Middle grey adds nothing to the mean: what is left is the direction of the known.
        mean = 2 * averaged(np.where(known, array, 0.5), height, width) - 1
        length = np.linalg.norm(mean, axis=-1, keepdims=True)
        seen = (share >= 0.5) & (length > 1e-3)
        return np.where(seen, mean / np.maximum(length, 1e-3) / 2 + 0.5, 0.5).astype(np.float32)

    def mirror(self, array: np.ndarray) -> np.ndarray:
        """What pointed to the right points to the left."""
        out = super().mirror(array)
        out[..., 0] = (255 if out.dtype == np.uint8 else 1) - out[..., 0]
        return out

    def known_at(self, batch: jax.Array) -> jax.Array:
        """Where a vector is."""
        return unit_vectors(batch)


def unit_vectors(normals: jax.Array) -> jax.Array:
    """Where colours ``[..., 3]`` in [0, 1] are unit vectors, about: bool ``[...]``."""
    square = ((2 * normals - 1) ** 2).sum(-1)
    return (square >= 0.25) & (square <= 2.25)
