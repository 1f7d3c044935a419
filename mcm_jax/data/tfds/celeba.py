"""CelebAMask-HQ: 30,000 faces, a mask for each of 18 parts, merged into 19 classes.

Source: Lee et al., MaskGAN, CVPR 2020; https://github.com/switchablenorms/CelebAMask-HQ, whose README gives 30,000
images and 19 classes at 512x512. Two orders of the labels are published. Each is also the order in which its authors
lay the masks over one another (a later part covers an earlier one), so the two differ in more than numbers:

- ``celebamask_hq``: the data set's own, ``face_parsing/Data_preprocessing/g_mask.py`` there;
- ``face_parsing``: ``prepropess_data.py`` of https://github.com/zllrunning/face-parsing.PyTorch, which the models of
  face parsing and, by its grey levels, the figures of the MCM paper follow.

The splits are those of CelebA, by ``g_partition.py``: images of CelebA from 162771 validate, from 182638 test.
"""

import dataclasses
import pathlib

import numpy as np

from mcm_jax.data.classes import Classes
from mcm_jax.data.problems import few
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, lines, picture, pixels, png, shards
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality

_PARTS = {
    "celebamask_hq": """skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l
        neck cloth""",
    "face_parsing": """skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r nose mouth u_lip l_lip neck neck_l
        cloth hair hat""",
}
ORDERS = {order: ("background", *parts.split()) for order, parts in _PARTS.items()}
"""The 19 classes as each publication numbers them, from 0. eye_g are glasses, ear_r earrings, neck_l a necklace."""

_MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
_MASKS = "CelebAMask-HQ-mask-anno"
_IMAGES = "CelebA-HQ-img"
_VALIDATION, _TEST = 162771, 182638  # first images of CelebA


@dataclasses.dataclass(frozen=True)
class CelebAMaskHQ(Layout):
    """Images 1024x1024 (JPEG) and segmentations 512x512.

    Attributes:
      order: of the labels, a key of :data:`ORDERS`.
    """

    name = "celeba_hq_mask"
    page = "https://github.com/switchablenorms/CelebAMask-HQ"
    licence = "non-commercial research; must not be passed on"
    download = f"""unpack CelebAMask-HQ.zip, so that --manual_dir has CelebAMask-HQ/{_IMAGES}/0.jpg to 29999.jpg,
        CelebAMask-HQ/{_MASKS}/0/00000_skin.png to folder 14, and CelebAMask-HQ/{_MAPPING}."""
    counts = {"train": 24_183, "validation": 2_993, "test": 2_824}

    order: str = "celebamask_hq"

    def __post_init__(self):
        expect(self.order in ORDERS, "order", f"one of {', '.join(ORDERS)}", self.order)

    def holds(self, folder: pathlib.Path) -> Holds:
        """19 classes of segmentation."""
        del folder
        sides = [(f"l_{part}", f"r_{part}") for part in ("eye", "brow", "ear")]
        classes = Classes(ORDERS[self.order], swap=dict(sides + [pair[::-1] for pair in sides]))
        return Holds((Modality("segmentation", "labels", 19),), classes={"segmentation": classes})

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """As CelebA splits them."""
        folder = folder / "CelebAMask-HQ" if (folder / "CelebAMask-HQ").is_dir() else folder
        self.need(folder, _IMAGES, _MASKS, _MAPPING)
        names: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for line in lines(folder / _MAPPING)[1:]:  # idx, orig_idx, ...
            fields = line.split()
            if len(fields) < 2 or not (fields[0].isdecimal() and fields[1].isdecimal()):
                raise UserError(f"{folder / _MAPPING}: expected two whole numbers first in each line, found {line!r}")
            original = int(fields[1])
            split = "train" if original < _VALIDATION else "validation" if original < _TEST else "test"
            names[split].append(str(int(fields[0])))
        missing = [i for part in names.values() for i in part if not (folder / _IMAGES / f"{i}.jpg").is_file()]
        if missing:
            self.need(folder, *(f"{_IMAGES}/{i}.jpg" for i in missing))

        def read(name: str) -> Record:
            return {
                "image": picture(folder / _IMAGES / f"{name}.jpg"),
                "segmentation": png(merge(folder / _MASKS, int(name), self.order)),
            }

        return {split: shards(part, read) for split, part in names.items() if part}


def merge(masks: pathlib.Path, index: int, order: str) -> np.ndarray:
    """The labels of an image: uint8 ``[512, 512]``.

    Args:
      masks: ``CelebAMask-HQ-mask-anno``.
      index: of the image, 0 to 29,999.
      order: a key of :data:`ORDERS`.

    Raises:
      UserError: there is no mask of it, or one cannot be read or has another size than the others.
    """
    labels: np.ndarray | None = None
    for value, part in enumerate(ORDERS[order][1:], 1):
        path = masks / str(index // 2000) / f"{index:05}_{part}.png"
        if not path.is_file():
            continue  # a part that the picture does not show
        mask = pixels(path) > 0
        labels = np.zeros(mask.shape, np.uint8) if labels is None else labels
        if mask.shape != labels.shape:
            raise UserError(
                f"{path}: found {mask.shape[1]}x{mask.shape[0]} pixels, its other parts have {labels.shape[1]}"
            )
        labels[mask] = value
    if labels is None:
        shown = few([f"{index:05}_{part}.png" for part in ORDERS[order][1:]])
        raise UserError(f"{masks / str(index // 2000)}: no mask of image {index}; expected some of {shown}")
    return labels
