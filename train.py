"""Trains an MCM on a frozen base.

python train.py --config=configs/scenes.py --workdir=runs/scenes [--config.train.steps=2000 ...]

The same command goes on with a run that was stopped. On several hosts that share a file system, run it on each:
--coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto where JAX knows the cluster: Cloud TPU,
Slurm, Open MPI, Kubernetes). If one of them fails, all end.
"""

from absl import flags
from ml_collections import config_flags

from mcm_jax import cli
from mcm_jax.training import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/scenes.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics, pictures")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps of which a trace is written into WORKDIR/profile")
cli.define_distributed_flags()


def main(argv: list[str]) -> None:
    del argv
    train_and_evaluate(_CONFIG.value, _WORKDIR.value, profile=cli.span(_PROFILE.value, "--profile"))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
