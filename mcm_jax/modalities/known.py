"""Modalities that have a name in the field, and what is known of each by its name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Known:
    """What a name says of a modality.

    Attributes:
      kind: see :data:`mcm_jax.modalities.KINDS`.
      channels: None where they are counted in the data.
      judge: what evaluates it, as ``evaluation.judges`` takes it; '' where that needs a net or a function of the
        user's.
      extractor: what ``python -m mcm_jax.data make --extract`` calls it; '' where that needs the user's.
    """

    kind: str
    channels: int | None
    judge: str = ""
    extractor: str = ""


_KNOWN = {
    "segmentation": Known("labels", None),
    "sketch": Known("lines", 1, "edges", "sketch"),
    "canny": Known("lines", 1, "edges", "canny"),
    "lineart": Known("lines", 1, "edges"),
    # Black on white, but no lines: how strong an edge is would be lost where lines are brought to full strength.
    "soft_edges": Known("map", 1, "edges", "soft_edges"),
    "depth": Known("map", 1),
    "normals": Known("normals", 3),
    "pose": Known("map", 3),
    "keypoints": Known("map", None),
    "strokes": Known("sparse", 3, "colour", "strokes"),
    "inpainting": Known("sparse", 3, "colour", "inpainting"),
    "grey": Known("map", 1, "ms_ssim", "grey"),
    "low_resolution": Known("map", 3, "colour:size=-1", "low_resolution"),
}


def known(name: str) -> Known | None:
    """What the name of a modality says; None for a name of the user's own."""
    return _KNOWN.get(name)
