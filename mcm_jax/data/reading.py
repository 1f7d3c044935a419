"""Reads the files of an example: its picture, conditions and prompt, on the base's grid."""

import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from mcm_jax.data.captions import MOST_OF_PROMPT
from mcm_jax.data.classes import Classes, contradicts, labels_of_colors
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality, PictureBytes, cover, open_picture
from mcm_jax.modalities.files import eight_bits, over
from mcm_jax.modalities.modality import open_condition

_ORIENTATION = 0x0112  # of EXIF, and what undoes each
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = frozenset(_UPRIGHT[i] for i in (5, 6, 7, 8))
"""What makes a picture that lies on its side upright."""

Source = pathlib.Path | PictureBytes
"""A file, or what is in one."""


def read_example(
    source_of: Callable[[str], Source | None],
    modalities: Sequence[Modality],
    classes: Mapping[str, Classes],
    height: int,
    width: int,
) -> dict[str, np.ndarray]:
    """The image and the conditions of an example, as :class:`Folder` gives them.

    Args:
      source_of: gives the picture of ``image``, and of each modality, or None where it is missing.
      modalities: what is read.
      classes: of the modalities of labels whose pictures may show them by colours.
      height: of the grid.
      width: of the grid.

    Raises:
      UserError: a picture is damaged, holds something else than it should, or has another shape than its image.
    """
    path = source_of("image")
    picture = read_image(path)
    box = cover(picture.height, picture.width, height, width)
    top, left, bottom, right = box
    example = {"image": np.array(picture.resize((width, height), Image.Resampling.LANCZOS, (left, top, right, bottom)))}
    for modality in modalities:
        source = source_of(modality.name)
        if source is None:
            example[modality.name] = modality.pack(modality.null(1, height, width)[0])
            continue
        condition = read_condition(source, modality, classes.get(modality.name))
        check_shape(source, condition, path, picture)
        scales = (condition.shape[0] / picture.height, condition.shape[1] / picture.width)
        scaled = tuple(edge * scale for edge, scale in zip(box, scales * 2, strict=True))
        example[modality.name] = to_grid(modality, condition, scaled, height, width)
    return example


def read_image(path: Source) -> Image.Image:
    """Any picture as upright RGB, its transparent parts over white. Raises UserError where it cannot be read."""
    with open_picture(path, "Replace it, or remove it and its conditions") as picture:
        picture.load()
        turn = turn_of(picture)
        picture = eight_bits(picture, path)
        picture = over(picture, "white") if picture.has_transparency_data else picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def turn_of(picture: Image.Image) -> Transpose | None:
    """What makes a picture upright. EXIF data that cannot be read turn nothing, as in any viewer."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


def read_caption(path: pathlib.Path) -> str:
    """The prompt in a file. Raises UserError where it is no text of one line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_OF_PROMPT + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a text file in UTF-8 ({e}). Save it as UTF-8") from e
    if len(text) > MOST_OF_PROMPT:
        raise UserError(
            f"{path}: expected one line, the prompt, found more than {MOST_OF_PROMPT:,} characters. Write one"
        )
    lines = text.split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != 1:
        raise UserError(f"{path}: expected one line, the prompt, found {len(prompts)}. Write one")
    return prompts[0]


def read_condition(path: Source, modality: Modality, classes: Classes | None = None) -> np.ndarray:
    """:func:`read_png`; of labels whose classes have colours, a colour PNG is read by these.

    So is one of a palette or of one bit all of whose colours are the classes'; of any other the index counts. Where
    colours of classes are at other indices than the classes', it could be either, and is refused.
    """
    return condition_of(open_condition(path, modality), path, modality, classes)


def condition_of(picture: Image.Image, path: Source | str, modality: Modality, classes: Classes | None) -> np.ndarray:
    """What :func:`read_condition` makes of a file, of a picture that is loaded; `path` is what messages call it."""
    array = None
    is_png = picture.format in (None, "PNG")  # None: made in memory
    has_colors = modality.kind == "labels" and classes is not None and classes.colors is not None
    if has_colors and is_png and picture.mode in ("RGB", "RGBA", "P", "1"):
        if picture.mode == "RGBA" and (count := int((np.asarray(picture)[..., 3] != 255).sum())):
            raise UserError(
                f"{path}: {count:,} of {picture.width * picture.height:,} pixels are transparent, expected labels "
                f"without an alpha channel. Save it as RGB, unknown pixels in the ignore_color of classes.json"
            )
        pixels = np.asarray(picture.convert("RGB"))
        try:
            array = labels_of_colors(pixels, classes, modality.ignore, str(path))
        except UserError as e:
            if picture.mode in ("RGB", "RGBA"):
                raise
            if contradicts(np.asarray(picture), pixels, classes):
                raise UserError(
                    f"{e}. Its indices, which would count where colours are no classes', say other classes than the "
                    f"colours do; if the indices are right, save them as greyscale"
                ) from e
    if array is None:
        array = modality.definition.decode(picture, path)
    modality.check(array, str(path))
    return array


def check_shape(path: Source, condition: np.ndarray, image: Source, picture: Image.Image) -> None:
    """Raises UserError where a condition ``[H, W]`` or ``[H, W, C]`` has another aspect ratio than its picture."""
    if not _same_aspect_ratio(condition.shape[:2], (picture.height, picture.width)):
        raise UserError(
            f"{path}: is {_size(*condition.shape[:2])}, which is another shape than {image}: "
            f"{_size(picture.height, picture.width)}{_turned(image)}. A condition shows all of its picture; "
            f"its resolution may differ, its aspect ratio may not"
        )


def check_mask(path: Source, image: Source) -> None:
    """Raises UserError where a mask has another aspect ratio than the picture that it is of; decodes neither."""
    with open_picture(path) as mask, open_picture(image) as picture:
        own, shape = (mask.height, mask.width), (picture.height, picture.width)
        shape = shape[::-1] if turn_of(picture) in SIDEWAYS else shape
    if not _same_aspect_ratio(own, shape):
        raise UserError(
            f"{path}: is {_size(*own)}, which is another shape than {image}: {_size(*shape)}{_turned(image)}. Of each "
            f"the centre is taken, so a mask must have its picture's aspect ratio; its resolution may differ"
        )


def _same_aspect_ratio(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes can be one picture's, each rounded: within a pixel of the smaller."""
    (height, width), (large_height, large_width) = sorted((a, b), key=lambda size: size[0] * size[1])
    return (
        abs(width - large_width * height / large_height) <= 1 or abs(height - large_height * width / large_width) <= 1
    )


def to_grid(modality: Modality, condition: np.ndarray, box: Sequence[float], height: int, width: int) -> np.ndarray:
    """The part ``box`` (top, left, bottom, right, in the condition's pixels) on the grid, 8 bits a value."""
    return modality.pack(modality.crop(condition, box, height, width))


def _size(height: int, width: int) -> str:
    return f"{width}x{height} pixels"


def _turned(path: Source) -> str:
    """A remark for a picture that its EXIF data turns by 90 degrees, where many tools do not."""
    with open_picture(path) as picture:
        return " as its EXIF data turns it" if turn_of(picture) in SIDEWAYS else ""
