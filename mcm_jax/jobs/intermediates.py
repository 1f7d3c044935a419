"""One picture of where and when MCMs act: what the networks say on the way to a sample."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mcm_jax import pictures
from mcm_jax.engine import Progress, View
from mcm_jax.errors import expect

_MARGIN, _HEADER, _LEAST = 150, 20, 96


class Intermediates:
    """Looks at evenly spaced steps of the first sample: a callback of :meth:`mcm_jax.pipeline.Pipeline.__call__`.

    The first step is not looked at: before it there is noise alone.

    Args:
      count: how many steps, at least 1.
      steps: sampling steps; more steps than there are after the first are all of these.
    """

    def __init__(self, count: int, steps: int):
        expect(count >= 1, "intermediates", "a number of steps, at least 1", count)
        expect(steps >= 2, "steps", "at least 2 where intermediates are shown", steps)
        self.steps, self.views = steps, dict[int, View]()
        self._chosen = {*np.linspace(1, steps - 1, min(count, steps - 1)).round().astype(int).tolist()}

    def __call__(self, now: Progress) -> None:
        if now.samples.start == 0 and now.step in self._chosen:
            self.views[now.step] = now.look()

    def picture(self, names: Sequence[str]) -> np.ndarray:
        """Columns the steps; rows the base's estimate of x0, the modulated one, and of each MCM gamma and nu.

        Gamma and nu are means over the channels, white at 0, red above and blue below; each row says at what value the
        colour is full, the largest in it.

        Args:
          names: of the MCMs.

        Returns:
          uint8 ``[H, W, 3]``, labelled.
        """
        views = list(self.views.values())
        rows = {key: [pictures.to_uint8(getattr(v, field)[0]) for v in views] for key, field in _ESTIMATES.items()}
        for i, name in enumerate(names):
            for part, symbol in enumerate(("gamma", "nu")):
                maps = [np.nan_to_num(view.maps[i][part][0].mean(-1)) for view in views]
                scale = float(np.abs(maps).max())
                label = f"{symbol}, ±{scale:.2g}" + (f"\n{name[-24:]}" if len(names) > 1 else "")
                rows[label + " " * i] = [pictures.signed(m, scale) for m in maps]
        height, width = next(iter(rows.values()))[0].shape[:2]
        factor = max(1, -(-_LEAST // height))
        cell = (factor * width, factor * height)
        sheet = Image.new("RGB", (_MARGIN + len(views) * (cell[0] + 2), _HEADER + len(rows) * (cell[1] + 2)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
        for column, step in enumerate(self.views):
            draw.text((_MARGIN + column * (cell[0] + 2), 3), f"step {step + 1} of {self.steps}", "black", font)
        for row, (label, images) in enumerate(rows.items()):
            top = _HEADER + row * (cell[1] + 2)
            draw.text((4, top + 4), label.rstrip(), "black", font)
            for column, image in enumerate(images):
                large = Image.fromarray(image).resize(cell, Image.Resampling.NEAREST)
                sheet.paste(large, (_MARGIN + column * (cell[0] + 2), top))
        return np.asarray(sheet)


_ESTIMATES = {"base's estimate of x0": "base", "estimate under control": "x0"}
