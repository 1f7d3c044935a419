"""Measures the control of a trained MCM on held-out maps.

python evaluate.py --workdir=runs/scenes --out=runs/scenes/metrics.json

Writes the metrics and, beside them, samples.png: conditions, samples of the base alone, samples under control.
"""

from absl import flags

from mcm_jax import cli
from mcm_jax.evaluation.evaluate import evaluate
from mcm_jax.sampling import SamplingSettings

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py, or the name of a shipped MCM")
_OUT = flags.DEFINE_string("out", None, "JSON file for the metrics")
_MAPS = flags.DEFINE_integer("maps", None, "Held-out maps; default: the config's evaluation.maps")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise")
_SETTINGS = cli.define_flags(SamplingSettings)


def main(argv: list[str]) -> None:
    del argv
    evaluate(
        _WORKDIR.value,
        _OUT.value,
        maps=_MAPS.value,
        seed=_SEED.value,
        **_SETTINGS(),
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
