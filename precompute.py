"""Makes the cache of a frozen base's predictions, so that training needs the base no more.

python precompute.py --config=configs/scenes.py --workdir=runs/scenes
python train.py --config=configs/scenes.py --workdir=runs/scenes --config.cache.mode=on

The same command goes on with a build that was stopped, and rebuilds shards that are damaged. On several hosts that
share a file system, run it on each: --coordinator=HOST:PORT --num_processes=N --process_id=I (--coordinator=auto where
JAX knows the cluster: Cloud TPU, Slurm, Open MPI).
"""

import jax
from absl import flags
from ml_collections import config_flags

from mcm_jax import cli
from mcm_jax.errors import UserError
from mcm_jax.training import precompute

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/scenes.py", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Holds the cache, in cache/, unless config.cache.path is set")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, or auto; for several hosts")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes there are")
_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0")


def main(argv: list[str]) -> None:
    del argv
    if _COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif _COORDINATOR.value:
        if _COUNT.value is None or _ID.value is None or not 0 <= _ID.value < _COUNT.value:
            raise UserError("--coordinator needs --num_processes=N and --process_id=I, with I in 0..N-1")
        jax.distributed.initialize(_COORDINATOR.value, _COUNT.value, _ID.value)
    precompute(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
