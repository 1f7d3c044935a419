"""What an evaluation samples: the rows of its table, all for the same held-out examples and the same noise."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import SamplingSettings


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of sampling.

    Attributes:
      name: of the row.
      given: modalities that are shown to the MCM, for the examples that have them.
      guidance: modality guidance; 0 is the base alone.
      told: whether a text-conditional base is told the captions, or the empty prompt.
    """

    name: str
    given: tuple[str, ...] = ()
    guidance: float = 0.0
    told: bool = True


_MOST = 4  # modalities of which every subset is sampled


def subsets(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every subset but the empty one, by its name: everything (``both``, ``all``) first, each alone last.

    Of more than four modalities everything and each alone: of ten there are 1,023 subsets.
    """
    found, sizes = {}, range(len(names), 0, -1)
    for size in sizes if len(names) <= _MOST else (len(names), 1):
        for given in itertools.combinations(names, size):
            everything = size == len(names) > 1
            found[("both" if size == 2 else "all") if everything else "+".join(given)] = given
    return found


def rows_of(names: Sequence[str], guidance: float, more: Sequence[float], is_text_conditional: bool) -> list[Row]:
    """The rows: the base alone, untold and told, then each subset of the modalities at each strength.

    Args:
      names: of the modalities.
      guidance: modality guidance of the rows that are called by their subset alone.
      more: further strengths; their rows' names end in ``@strength``.
      is_text_conditional: whether the base takes prompts.
    """
    rows = [Row("unprompted", told=False)] if is_text_conditional else []
    rows.append(Row("base"))
    for scale in dict.fromkeys([guidance, *more]):
        end = "" if scale == guidance else f"@{scale:g}"
        rows += [Row(name + end, given, scale) for name, given in subsets(names).items()]
    return rows


class Sampler:
    """Samples for held-out examples.

    Args:
      pipeline: base and MCM.
      held_out: the examples.
      settings: how samples are drawn, but for the guidance.
    """

    def __init__(self, pipeline: Pipeline, held_out: HeldOut, settings: SamplingSettings):
        self._pipeline, self._settings = pipeline, settings
        at_hand = held_out.conditions
        self._conditions = {m.name: m.resize_all(at_hand[m.name], *pipeline.grid) for m in pipeline.modalities}
        self._present = held_out.present
        self._captions = held_out.captions if pipeline.base.is_text_conditional else None

    def __call__(
        self, row: Row, keys: jax.Array, which: np.ndarray, done: Callable[[int], object] = lambda count: None
    ) -> np.ndarray:
        """Samples one picture a key.

        Args:
          row: how.
          keys: ``[N]``, see :func:`mcm_jax.sampling.sample_keys`.
          which: int ``[N]``, the example that each is for.
          done: is told after each batch how many were drawn.

        Returns:
          float32 ``[N, H, W, 3]`` in [-1, 1].

        Raises:
          UserError: a sample came out as NaN, which no judge can say anything of.
        """
        how = dataclasses.asdict(dataclasses.replace(self._settings, guidance=row.guidance))
        parts = []
        for start in range(0, len(which), self._settings.batch_size):
            part = which[start : start + self._settings.batch_size]
            given = {name: self._conditions[name][part] for name in row.given}
            texts = None
            if self._captions is not None:
                texts = [self._captions[i] if row.told else "" for i in part]
            present = {name: self._present[name][part] for name in row.given}
            images = self._pipeline(given, keys[start : start + len(part)], prompts=texts, present=present, **how)
            if odd := int((~np.isfinite(images).all((1, 2, 3))).sum()):
                raise UserError(
                    f"{odd} of {len(images)} samples of {row.name!r} came out as NaN; take less guidance or float32"
                )
            parts.append(np.clip(images, -1, 1))
            done(len(part))
        return np.concatenate(parts)
