"""Checkpoints of a run, by Orbax: the MCM's state and, as JSON, what it belongs to. The base is not in them."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp

from mcm_jax.errors import UserError
from mcm_jax.pipeline import check_same_shapes
from mcm_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of a workdir, ``W/checkpoints/STEP``.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, *, create: bool = True):
        self.folder = workdir.absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=False)
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; one whose writing was cut off does not count."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes a checkpoint under a temporary name and renames it when it is complete."""
        step = int(state.step)
        if step == self.latest_step():
            return
        # From the host: every device holds it all, and Orbax would have each one write a slice of each array.
        args = ocp.args.Composite(state=ocp.args.StandardSave(jax.device_get(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, meta: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint: its state, and the ``meta`` that it was saved with.

        Args:
          like: a state of the expected structure, shapes and sharding; its values are not used.
          meta: what the checkpoint must belong to; keys: ``base``, ``fingerprint``, and
            optionally ``examples``, a digest of the data set.

        Raises:
          UserError: there is none, it belongs to another base, other examples, or an MCM of other shapes (lists both
            sides), or it is damaged.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self.folder}: no complete checkpoint; train first, or wait for the first one")
        name = f"{self.folder}/{step}"
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if found["fingerprint"] != meta["fingerprint"]:
            raise UserError(
                f"{name} was trained on the base {found['base']!r} with fingerprint {found['fingerprint'][:16]}, but "
                f"the base {meta['base']!r} has {meta['fingerprint'][:16]}. Set config.base.path to the base it was "
                f"trained on"
            )
        if meta.get("examples") and found.get("examples", meta["examples"]) != meta["examples"]:
            raise UserError(
                f"{name}: the training examples are others than this run began with (files came, went or changed). Put "
                f"them back, or train in another workdir"
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


def _params_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    return {name: shape for name, shape in shapes.items() if name.startswith("params/")}
