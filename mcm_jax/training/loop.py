"""The training run: config and workdir in, checkpoints, metrics and pictures out."""

import json
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from mcm_jax import assets, pictures, sampling
from mcm_jax import config as config_lib
from mcm_jax.base import load_base
from mcm_jax.data.pipeline import InMemory, to_float, training_batches
from mcm_jax.data.scenes import Scenes
from mcm_jax.errors import UserError
from mcm_jax.mcm import Modulator
from mcm_jax.pipeline import Pipeline, save_mcm
from mcm_jax.training import sharding, state, step
from mcm_jax.training.checkpoints import Checkpoints

_VALIDATION_IMAGES = 8


class Interrupted(Exception):
    """The run was stopped by a signal, after its state was saved."""


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs, so that a step is never torn; a second SIGINT interrupts."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log:
    """One JSON line and one TensorBoard event a report. Lines after the resumed step are dropped: they come again."""

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        from tensorboardX import SummaryWriter  # slow to import

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step or None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for key, value in metrics.items():
            self._events.add_scalar(key, value, step)

    def close(self) -> None:
        self._events.close()


def _validation_pictures(pipeline: Pipeline, modulator: Modulator, examples: dict[str, np.ndarray]) -> np.ndarray:
    conditions = {m.name: examples[m.name] for m in modulator.modalities}
    keys = sampling.sample_keys(0, _VALIDATION_IMAGES)
    rows = [pictures.show(m, examples[m.name]) for m in modulator.modalities]
    alone = pipeline(conditions, keys, guidance=0.0, batch_size=_VALIDATION_IMAGES)
    controlled = pipeline(conditions, keys, batch_size=_VALIDATION_IMAGES)
    return pictures.grid([*rows, pictures.to_uint8(alone), pictures.to_uint8(controlled)])


def _prepare_workdir(workdir: pathlib.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as e:
        raise UserError(
            f"workdir {workdir}: cannot be written ({e.strerror}). Free space or permissions there, or take another "
            f"--workdir"
        ) from e


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> state.TrainState:
    """Trains an MCM; goes on where the workdir's newest checkpoint ends.

    Args:
      config: as configs/default.py has it.
      workdir: gets ``config.json``, ``checkpoints/``, ``mcm.safetensors`` (what samples), ``metrics.jsonl``,
        ``tensorboard/`` and ``validation/``. One that holds another run's config is refused.

    Returns:
      The final state.

    Raises:
      UserError: bad input, see its message; nothing of the workdir is changed.
      Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    config_lib.check(config)
    workdir = pathlib.Path(workdir)
    train = config.train
    mesh = sharding.make_mesh()
    sharding.check_batch_size(train.batch_size, mesh)
    base = load_base(assets.resolve(config.base.path), config.base.dtype)
    timesteps = base.schedule.num_train_timesteps
    if config.sampling.steps > timesteps:
        raise UserError(
            f"config.sampling.steps must be at most {timesteps}, the base's timesteps; got {config.sampling.steps}"
        )
    modulator = config_lib.modulator(config, base)
    meta = {"base": base.name, "fingerprint": base.fingerprint, "config": json.loads(config.to_json())}

    root = jax.random.key(config.seed)
    optimizer, learning_rate = state.make_optimizer(
        train.steps, train.learning_rate, train.warmup_steps, train.weight_decay, train.clip_norm
    )
    params = jax.jit(lambda key: modulator.init(key, base.latent_shape))(jax.random.fold_in(root, 1))
    now = sharding.replicate(state.init_state(params, optimizer), mesh)
    base_params = sharding.replicate(base.params, mesh)
    _prepare_workdir(workdir)
    config_lib.save(config, workdir)
    checkpoints = Checkpoints(workdir, train.keep)
    reported, sums = 0, None  # the last reported step, and the metrics' sums since then
    if checkpoints.latest_step() is not None:
        now, found = checkpoints.restore(now, meta)
        reported, sums = found["reported"], found["sums"] and {k: np.float32(v) for k, v in found["sums"].items()}
    first = int(now.step)
    size = sum(p.size for p in jax.tree.leaves(params))
    frozen = sum(p.size for p in jax.tree.leaves(base.params))
    print(f"MCM of {size:,} parameters ({size / frozen:.1%} of the base {base.name!r}), on {mesh.size} device(s)")
    if first >= train.steps:
        print(f"{workdir} is finished: {first} of {train.steps} steps are done")
        checkpoints.close()
        return now
    print(f"going on from step {first}" if first else f"rendering {config.data.size:,} training examples")

    height, width, _ = base.image_shape
    source = InMemory.render(Scenes("train", config.data.size, height, width, config.data.seed))
    maps = [m.name for m in modulator.modalities if m.kind != "labels"]
    batches = training_batches(source, train.batch_size, config.seed, maps)
    validation = InMemory.render(Scenes("test", _VALIDATION_IMAGES, height, width, config.data.seed)).arrays
    noise_step = step.make_noise_step(
        base,
        modulator,
        seed=config.seed,
        drop_rate=config.modalities.drop_rate,
        draws=config.data.draws,
    )
    predictions = step.Predictions(base, len(source), config.data.draws)
    train_step = step.make_train_step(
        modulator, optimizer, weighting=config.loss.weighting, l1=config.loss.l1, ema_decay=train.ema_decay
    )
    pipeline = Pipeline(base, modulator, None, config)
    log = _Log(workdir, first)

    def last_complete() -> str:
        step = checkpoints.latest_step()
        return "There is no complete checkpoint yet" if step is None else f"The last complete one is of step {step}"

    def checkpoint() -> None:
        pending = {"reported": reported, "sums": sums and {k: float(v) for k, v in sums.items()}}
        try:  # the checkpoint comes last: a run that is killed between the two writes both again
            save_mcm(workdir, now.ema_params, base=base, step=int(now.step))
            checkpoints.save(now, meta | pending)
        except Exception as e:  # Orbax wraps the system's error in several kinds
            raise UserError(
                f"workdir {workdir}: the checkpoint of step {int(now.step)} could not be written ({e}). "
                f"{last_complete()}. Free space there and run the same command again"
            ) from e

    began, timed = time.perf_counter(), first
    try:
        with (
            _stop_requests() as stop,
            tqdm(total=train.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=1.0) as bar,
        ):
            for i in range(first, train.steps):
                batch = batches[i]
                record = noise_step(base_params, sharding.split_batch(batch, mesh))
                now, metrics = train_step(now, predictions(base_params, batch, record))
                sums = metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, metrics)
                bar.update()
                done = i + 1
                if done % train.log_every == 0 or done == train.steps:
                    means = {k: float(v) / (done - reported) for k, v in sums.items()}
                    rate = train.batch_size * (done - timed) / (time.perf_counter() - began)
                    if not np.isfinite(means["loss"]):
                        raise UserError(
                            f"the loss is {means['loss']} at step {done}; lower train.learning_rate or set "
                            f"train.clip_norm, and train in another workdir"
                        )
                    log.write(done, means | {"images_per_second": rate, "learning_rate": float(learning_rate(i))})
                    bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{rate:.0f}")
                    reported, sums = done, None
                    began, timed = time.perf_counter(), done
                stopping = bool(stop) and done < train.steps  # asked once: a later signal stops the next step
                if done % train.checkpoint_every == 0 or done == train.steps or stopping:
                    checkpoint()
                    began = time.perf_counter() if reported == done else began
                if train.validate_every and done % train.validate_every == 0:
                    pipeline.params = now.ema_params
                    examples = to_float(validation, maps)
                    sheet = _validation_pictures(pipeline, modulator, examples)
                    pictures.save_png(workdir / "validation" / f"step_{done:07d}.png", sheet)
                if stopping:
                    raise Interrupted(
                        f"stopped by a signal at step {done} of {train.steps}; the state is saved in {workdir}. "
                        f"Go on with the same command"
                    )
    except OSError as e:
        raise UserError(
            f"workdir {workdir}: writing failed ({e.strerror or e}). {last_complete()}. Free space there and run the "
            f"same command again"
        ) from e
    finally:
        log.close()
        checkpoints.close()
    return now
