"""Paired examples: an image and its conditions."""

from collections.abc import Sequence
from typing import Any

from mcm_jax.data.folder import Folder
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.scenes import Scenes
from mcm_jax.data.views import Views
from mcm_jax.modalities import Modality


def find_source(
    data: Any,
    split: str,
    modalities: Sequence[Modality],
    height: int,
    width: int,
    *,
    captions: bool,
    size: int | None = None,
) -> Scenes | Folder:
    """What :func:`open_source` opens, by the same arguments, but as it is: nothing is rendered or read yet."""
    if data.name == "folder":
        return Folder(data.path, split, modalities, height, width, captions)
    return Scenes(split, size or data.size, height, width, data.seed)


def open_source(
    data: Any,
    split: str,
    modalities: Sequence[Modality],
    height: int,
    width: int,
    *,
    captions: bool,
    size: int | None = None,
) -> Sequence[dict]:
    """The source that a config's ``data`` section names.

    Args:
      data: the section: ``name`` (``scenes`` or ``folder``), what that needs of ``path``, ``size``, ``seed``, and the
        ``views`` of each training example (:class:`mcm_jax.data.views.Views`).
      split: ``train`` or ``test``.
      modalities: which conditions are read.
      height: of the images.
      width: of the images.
      captions: whether prompts are read.
      size: how many scenes, in place of ``data.size``. A folder has as many examples as it has.

    Returns:
      Random access to examples of ``image`` (uint8 ``[height, width, 3]``), the modalities on the same grid (labels as
      integers, maps as value * 255), ``caption`` (a text, if asked for; scenes always have it).

    Raises:
      UserError: a folder that is not as docs/data.md says.
    """
    found = find_source(data, split, modalities, height, width, captions=captions, size=size)
    source = InMemory.render(found) if isinstance(found, Scenes) else found
    if split != "train" or (data.views, data.flip, data.crop) == (1, False, 1):
        return source
    return Views(source, modalities, views=data.views, flip=data.flip, crop=data.crop, seed=data.seed)
