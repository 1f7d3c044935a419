"""What all methods share: base, pairs, held-out maps and judges."""

import dataclasses
import functools
import importlib
from typing import Any

import jax

from mcm_jax.base import Base
from mcm_jax.config import read
from mcm_jax.data.inputs import Inputs, prepare
from mcm_jax.errors import UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, judges_of
from mcm_jax.modalities import Modality
from mcm_jax.sharding import make_mesh
from mcm_jax.training import RunSettings


@dataclasses.dataclass
class World:
    """What all methods share: base, pairs, held-out maps, judges.

    Attributes:
      run: the config's settings.
      base: the frozen model, on the mesh.
      held_out: maps to choose rates by, then those that are reported on.
      select: how many of the maps choose.
    """

    run: RunSettings
    base: Base
    mesh: jax.sharding.Mesh
    held_out: HeldOut
    judges: list[Judge]
    select: int
    _inputs: dict[tuple[int, int], Inputs] = dataclasses.field(default_factory=dict)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return self.run.modalities.shown

    @functools.cached_property
    def _source(self) -> Any:
        return self.run.data.open("train", self.modalities, self.base.card)

    def inputs(self, grid: tuple[int, int]) -> Inputs:
        """The training pairs with conditions on a grid."""
        if grid not in self._inputs:
            self._inputs[grid] = prepare(self.base, self._source, self.modalities, self.mesh, grid)
        return self._inputs[grid]


def open_world(
    config: str, *, pairs: int, select: int, report: int, references: int, text_guidance: float | None = None
) -> World:
    """Loads base, data and judges of a file in ``configs/``; text guidance is the config's where none is given."""
    settings = importlib.import_module(f"configs.{config}").get_config()
    if text_guidance is not None:
        settings.sampling.text_guidance = text_guidance
    settings.data.size, settings.cache.mode = pairs, "off"
    run = read(RunSettings, settings)
    mesh = make_mesh()
    base = run.base.load(mesh)
    held_out = HeldOut(run.data, base.card, run.modalities.shown, select + report)
    if run.loss.l1:
        raise UserError(f"{config}: loss.l1 is {run.loss.l1:g}; the peers have no scale and shift that it pulls, so 0")
    if len(held_out) <= select:
        raise UserError(f"{config}: {len(held_out)} held-out maps, of which --select={select} leaves none to report on")
    return World(run, base, mesh, held_out, judges_of(held_out, {}, references), select)
