"""Data sets of TensorFlow Datasets, built and read without TensorFlow (the extra ``tfds``; docs/tfds.md).

:mod:`.layout` and a module for each publisher say how downloaded files become records, :mod:`.build` writes them as a
TFDS data set of array_record files, and :mod:`.records` reads one, whoever built it.
"""

from mcm_jax.data.tfds.ade20k import ADE20K
from mcm_jax.data.tfds.celeba import CelebAMaskHQ
from mcm_jax.data.tfds.coco import COCOStuff
from mcm_jax.data.tfds.controlnet import ControlNet
from mcm_jax.data.tfds.folders import LHQ, FlickrMountains, PairedFolder
from mcm_jax.data.tfds.layout import Layout
from mcm_jax.data.tfds.scenes import RenderedScenes

_LAYOUTS = (RenderedScenes, CelebAMaskHQ, FlickrMountains, LHQ, COCOStuff, ADE20K, PairedFolder, ControlNet)

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in _LAYOUTS}
"""What can be built, by name."""
