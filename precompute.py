"""Makes the cache of a frozen base's predictions, so that training needs the base no more.

python precompute.py --config=configs/scenes.py --workdir=runs/scenes
python train.py --config=configs/scenes.py --workdir=runs/scenes --config.cache.mode=on

The same command goes on with a build that was stopped, and rebuilds shards that are damaged. On several hosts that
share a file system, run it on each: --coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto where
JAX knows the cluster: Cloud TPU, Slurm, Open MPI, Kubernetes). If one of them fails, all end.
"""

from absl import flags
from ml_collections import config_flags

from mcm_jax import cli
from mcm_jax.training import precompute

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/scenes.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Holds the cache, in cache/, unless config.cache.path is set")
cli.define_distributed_flags()


def main(argv: list[str]) -> None:
    del argv
    precompute(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
