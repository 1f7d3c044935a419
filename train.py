"""Trains an MCM on a frozen base, or a sweep of them.

python train.py --config=configs/scenes.py --workdir=runs/scenes [--config.train.steps=2000 ...]
python train.py --config=configs/scenes.py --sweep=configs/sweeps/draws.py --workdir=runs/draws [--sweep_index=3]

The same command goes on with what was stopped. On several hosts that share a file system, run it on each:
--coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto where JAX knows the cluster: Cloud TPU,
Slurm, Open MPI, Kubernetes). If one of them fails, all end.
"""

from absl import flags
from ml_collections import config_flags

from mcm_jax import cli
from mcm_jax.sweep.run import MODES, run_sweep
from mcm_jax.training import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/scenes.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, pictures")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps of which a trace is written into WORKDIR/profile")
_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, e.g. configs/sweeps/draws.py: many runs, see docs/sweeps.md")
_INDEX = flags.DEFINE_integer("sweep_index", None, "The one trial of the sweep to train, from 0, e.g. in a job array")
_MODE = flags.DEFINE_enum("sweep_mode", None, MODES, "How trials share the devices. Default: auto")
_WIDTH = flags.DEFINE_integer("sweep_width", None, "Trials a device computes at once. Default: one on CPUs, else all")
cli.define_distributed_flags()


def main(argv: list[str]) -> None:
    del argv
    if _SWEEP.value is None:
        train_and_evaluate(_CONFIG.value, _WORKDIR.value, profile=cli.span(_PROFILE.value, "--profile"))
        return
    mode, command = _MODE.value or "auto", cli.command("train.py", _CONFIG)
    how = dict(mode=mode, width=_WIDTH.value, index=_INDEX.value)
    run_sweep(_CONFIG.value, _SWEEP.value, _WORKDIR.value, **how, command=command)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.allow_only_with("sweep", ["sweep_index", "sweep_mode", "sweep_width"])
    flags.mark_flags_as_mutual_exclusive(["sweep", "profile"])
    cli.run(main)
