"""Checkpoints of a run, by Orbax: the MCM's state and, as JSON, what it belongs to. The base is not in them.

A checkpoint is written from host memory in the background, under a temporary name, and renamed when it is complete: a
process that is killed meanwhile leaves the one before it. The state in it is whole, whatever devices it was on, so that
it is restored on any others.
"""

import pathlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mcm_jax.errors import UserError
from mcm_jax.trained import check_same_shapes
from mcm_jax.training.state import TrainState
from mcm_jax.version import __version__

FORMAT = 1
"""Raised when older versions could not read what is written."""


class Checkpoints:
    """The checkpoints of a workdir, ``W/checkpoints/STEP``. Every process of a cluster makes the same calls.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.

    Attributes:
      kept: steps that stay, however old they grow.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, *, create: bool = True):
        self.folder = workdir.absolute() / "checkpoints"
        self.kept: set[int] = set()
        options = ocp.CheckpointManagerOptions(create=create, preservation_policy=_Keep(keep, self.kept))
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; one whose writing was cut off does not count."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to write a checkpoint; what goes wrong is raised by a later call, :meth:`wait` at the latest."""
        step = int(state.step)
        if step == self.latest_step():
            return
        # From the host: every device holds it all, and Orbax would have each one write a slice of each array. A copy:
        # on a CPU the arrays are the devices' own, which the next step takes over.
        whole = jax.tree.map(np.array, jax.device_get(state))
        meta = meta | {"format": FORMAT, "version": __version__}
        args = ocp.args.Composite(state=ocp.args.StandardSave(whole), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Until what is being written is there."""
        self._manager.wait_until_finished()

    def drop(self, steps: Collection[int]) -> None:
        """Removes checkpoints."""
        for step in sorted(steps, reverse=True):  # of what is left, the newest is always whole
            self._manager.delete(step)

    def restore(
        self, like: TrainState, meta: dict[str, Any], step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint: its state, and the ``meta`` that it was saved with.

        Args:
          like: a state of the expected structure, shapes and sharding; its values are not used.
          meta: what the checkpoint must belong to; keys: ``base``, ``fingerprint``, and
            optionally ``examples``, a digest of the data set.
          step: which; the newest if left out.

        Raises:
          UserError: there is none, it is of a newer version, it belongs to another base, other examples, or an MCM of
            other shapes or another optimizer (lists both sides), or it is damaged.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no complete checkpoint; train first, or wait for the first one")
        name = f"{self.folder}/{step}"
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if found.get("format", FORMAT) > FORMAT:
            raise UserError(
                f"{name} was written by mcm-jax {found.get('version')} in format {found['format']}, this version "
                f"({__version__}) reads format {FORMAT}. Go on with that version, or train in another workdir"
            )
        if found["fingerprint"] != meta["fingerprint"]:
            raise UserError(
                f"{name} was trained on the base {found['base']!r} with fingerprint {found['fingerprint'][:16]}, but "
                f"the base {meta['base']!r} has {meta['fingerprint'][:16]}. Set config.base.path to the base it was "
                f"trained on"
            )
        if meta.get("examples") and found.get("examples", meta["examples"]) != meta["examples"]:
            raise UserError(
                f"{name}: the training examples are others than this run began with (files came, went or changed, or "
                f"others are held out: a run that began before there was config.data.held_out_share needs it at 0). "
                f"Put them back, or train in another workdir"
            )
        with self._reading(step):
            there = _params_shapes(self._manager.item_metadata(step)["state"])
        check_same_shapes(there, _params_shapes(like), name)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        with self._reading(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args)["state"], found

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what a damaged checkpoint raises into one message."""
        try:
            yield
        except Exception as e:  # Orbax and TensorStore have no common kind of error for damaged files
            reason = (str(e).strip() or repr(e)).splitlines()[0][:300]
            raise UserError(
                f"{self.folder}/{step}: the checkpoint cannot be read ({reason}). "
                f"Remove that folder to go on from the one before it"
            ) from e

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


class _Keep:
    """Which checkpoints stay: the newest, and those of some steps. Orbax asks after each one that it has written."""

    def __init__(self, newest: int, steps: set[int]):
        self._newest, self._steps = newest, steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """See :class:`orbax.checkpoint.checkpoint_managers.PreservationPolicy`."""
        del context
        first = len(checkpoints) - self._newest
        return [i >= first or checkpoint.step in self._steps for i, checkpoint in enumerate(checkpoints)]


def _params_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    return {name: shape for name, shape in shapes.items() if name.startswith("params/")}
