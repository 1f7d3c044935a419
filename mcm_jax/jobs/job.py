"""A job: one picture to draw."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mcm_jax.data.reading import check_mask
from mcm_jax.errors import UserError, expect
from mcm_jax.request import check_shown
from mcm_jax.sampling import SamplingSettings, is_text

FILES = ("mask", "image", "inpaint")
"""Fields of a job that name a picture file, beside its conditions."""

CONTROLS = (
    "seed",
    "prompt",
    "strength",
    "window",
    "mask",
    "weights",
    "image",
    "inpaint",
    "variation_seed",
    "variation",
)
"""Fields of a job that a command may give all of its jobs."""

_LONGEST = 240  # of the 255 bytes that file systems have for a name, which ends on .png.tmp at first


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to draw.

    Attributes:
      name: the file's, without ending.
      conditions: picture file of each modality that is given, any subset.
      settings: how it is drawn; batches share all but :data:`mcm_jax.request.PER_SAMPLE`.
      seed: of the noise, 0..4294967295; sample i of a seed is the same whatever else is drawn. In a list each name has
        a seed of its own, made of this one.
      sample: which of the seed's samples.
      prompt: text, for a text-conditional base.
      strength: how much each modality counts, by its name, at least 0; 1 where left out.
      window: shares of the steps between which each modality is shown, by its name; all of them where left out.
      mask: picture file, white where the conditions hold; everywhere where left out.
      weights: of each MCM, at least 0; 1 each where left out.
      image: picture file to begin with, as far as image_strength says.
      inpaint: picture file, white where the image is drawn anew; its other pixels stay exactly.
      variation_seed: of another noise, its sample of the same number, which the seed's is moved towards; -1 for none.
      variation: how far, in [0, 1]; fresh noise of the sampler stays the seed's.
      source: where the job is from, for messages.
    """

    name: str
    conditions: Mapping[str, str]
    settings: SamplingSettings
    seed: int = 0
    sample: int = 0
    prompt: str = ""
    strength: Mapping[str, float] = dataclasses.field(default_factory=dict)
    window: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    mask: str = ""
    weights: tuple[float, ...] = ()
    image: str = ""
    inpaint: str = ""
    variation_seed: int = -1
    variation: float = 0.0
    source: str = ""

    def __post_init__(self):
        plain = is_text(self.name) and re.fullmatch(r"[^/\\\0.][^/\\\0]*", self.name)
        expect(bool(plain), "name", "a file name without folder and ending, not beginning with a dot", self.name)
        expect(len(self.name.encode()) <= _LONGEST, "name", f"of at most {_LONGEST} bytes in UTF-8", self.name)
        expect(is_text(self.prompt), "prompt", "a text in UTF-8", self.prompt)
        for key, least in (("seed", 0), ("sample", 0), ("variation_seed", -1)):
            value = getattr(self, key)
            expect(type(value) is int and least <= value < 2**32, key, "a whole number in 0..4294967295", value)
        for name, value in self.strength.items():
            expect(0 <= value < float("inf"), f"strength.{name}", "at least 0", value)
        for name, span in self.window.items():
            fine = len(span) == 2 and 0 <= span[0] <= span[1] <= 1
            expect(fine, f"window.{name}", "two shares of the steps, rising, in [0, 1]", span)
        expect(all(0 <= w < float("inf") for w in self.weights), "weights", "at least 0 each", self.weights)
        expect(
            bool(self.image or not self.inpaint), "inpaint", "given with an image, of which it is a part", self.inpaint
        )
        expect(0 <= self.variation <= 1, "variation", "in [0, 1]", self.variation)
        towards = self.variation_seed >= 0 or not self.variation
        expect(towards, "variation", "given with a variation_seed, whose noise is moved towards", self.variation)

    @property
    def files(self) -> dict[str, str]:
        """All picture files that it names: ``conditions.MODALITY``, and those of :data:`FILES` that are given."""
        given = {key: getattr(self, key) for key in FILES if getattr(self, key)}
        return {f"conditions.{name}": path for name, path in self.conditions.items()} | given


def check_typed(jobs: Sequence[Job], given: Mapping[str, Any]) -> None:
    """Raises UserError where something that was typed for jobs does nothing for any, or files do not go together.

    Args:
      jobs: as they are, with what is there by default.
      given: what was typed, fields of jobs and of their settings; None is not given.
    """
    given = {key: value for key, value in given.items() if value is not None}
    shown = {name for job in jobs for name in job.conditions}
    check_shown(shown, **{key: given.get(key) for key in ("strength", "window")})
    if "image_strength" in given and not any(job.image for job in jobs):
        raise UserError("image_strength: does nothing without an image to begin with; give one, or leave it out")
    idle = [key for key in ("negative_prompt", "text_rescale", "modulate") if given.get(key)]
    if idle and all(job.settings.text_guidance == 1 for job in jobs):
        raise UserError(
            f"{', '.join(idle)}: does nothing at text_guidance=1; set another text_guidance, or leave it out"
        )
    if given.keys() & {*FILES}:
        masks = {(mask, job.image) for job in jobs if job.image for mask in (job.mask, job.inpaint) if mask}
        for mask, image in sorted(masks):
            check_mask(mask, image)
