"""Two-dimensional conditions and the channels that the MCM sees of them.

A *modality* is a named kind of 2-D condition (segmentation, sketch, depth, ...). Every one becomes channels on the
grid of ``x_t``: labels one-hot by nearest neighbour, maps and lines by area averaging. An absent modality is its null
condition, zeros, and a presence flag tells it from a map that happens to be zero, so that one MCM serves any subset.
Where a condition says "unknown here" (:meth:`Modality.known_at`), its channels and flag are the null condition's, too.
One-hot labels, flags and zeros are ours; the paper claims the subsets and shows the grids (see also ``drop``).

Each kind of condition is a class in one place (:mod:`.labels`, :mod:`.maps`, :mod:`.normals`,
:mod:`.sparse`), that knows all of it; :mod:`.known` says what usual names mean.
"""

from mcm_jax.modalities.channels import drop, stack, total_channels
from mcm_jax.modalities.files import PICTURES, PictureBytes, open_picture
from mcm_jax.modalities.kind import Kind
from mcm_jax.modalities.known import Known, known
from mcm_jax.modalities.modality import KINDS, Modality, cover, read_png
from mcm_jax.modalities.settings import ModalitiesSettings

__all__ = [
    "KINDS",
    "PICTURES",
    "Kind",
    "Known",
    "ModalitiesSettings",
    "Modality",
    "PictureBytes",
    "cover",
    "drop",
    "known",
    "open_picture",
    "read_png",
    "stack",
    "total_channels",
]
