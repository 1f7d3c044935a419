"""Run by test_scale.py, once in each process of a cluster: trains one small config several times.

scale_program.py ROOT BASE PLAN [COORDINATOR COUNT ID]

PLAN is JSON: of each run its workdir's name, changes of the config, and steps.
"""

import json
import pathlib
import sys

import jax
import tiny

from mcm_jax import distributed
from mcm_jax.training import train_and_evaluate


def main(root, base, plan, coordinator=None, count=None, number=None):
    jax.config.update("jax_disable_most_optimizations", True)
    with distributed.cluster(coordinator, count and int(count), number and int(number)):
        for name, changes in json.loads(plan):
            train_and_evaluate(tiny.make_config(base, changes), pathlib.Path(root) / name)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
