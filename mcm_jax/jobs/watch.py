"""What a person sees while pictures are drawn."""

import math
import pathlib

import numpy as np
from tqdm import tqdm

from mcm_jax import pictures
from mcm_jax.engine import Progress
from mcm_jax.errors import UserError, expect

PREVIEW = "preview.png"


def write_picture(path: pathlib.Path, picture: np.ndarray, texts: dict[str, str] | None = None) -> None:
    """:func:`mcm_jax.pictures.save_png`; raises UserError where the disk is full or the folder gone."""
    try:
        pictures.save_png(path, picture, texts)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror or e}). The pictures before it are whole; the same command goes on"
        ) from e


class Watch:
    """One bar over the sampling steps of all batches, with the time left; and a sheet of the batch as it stands.

    A context; after it there is no sheet. It is a callback of :meth:`mcm_jax.pipeline.Pipeline.__call__`, every
    :attr:`every` steps: each is a call of the program by itself, which costs 2 to 3 ms of a processor, so the bar moves
    by a fiftieth of the whole.

    Args:
      steps: of all batches.
      pictures: of all, and how many of them are there already.
      out: folder of the sheet, ``OUT/preview.png``.
      preview_every: steps after which it is written anew; 0 for none.
    """

    def __init__(
        self, steps: int, pictures: tuple[int, int], out: pathlib.Path = pathlib.Path(), preview_every: int = 0
    ):
        expect(preview_every >= 0, "preview_every", "steps, or 0 (none)", preview_every)
        (self.total, self.done), self.preview_every, self.path = pictures, preview_every, out / PREVIEW
        self.every, self.step, self._shows = math.gcd(max(steps // 50, 1), preview_every), 0, False
        self.bar = tqdm(total=steps, unit=" steps", dynamic_ncols=True, disable=not steps)
        self.drawn(0)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self._shows:
            self.path.unlink(missing_ok=True)

    def __call__(self, now: Progress) -> None:
        self.bar.update(now.step - self.step)
        self.step = now.step % now.steps
        if self.preview_every and self.step and self.step % self.preview_every == 0:
            images = pictures.to_uint8(np.nan_to_num(now.preview()))
            columns = min(8, math.isqrt(len(images) - 1) + 1)
            write_picture(self.path, pictures.grid(pictures.rows_of(images, columns)))
            self._shows = True

    def skip(self, steps: int) -> None:
        """Leaves out a batch."""
        self.bar.update(steps)

    def drawn(self, count: int) -> None:
        """So many more pictures are there."""
        self.done += count
        self.bar.set_postfix_str(f"{self.done}/{self.total} pictures")
