"""Measures the control of a trained MCM on held-out maps.

python evaluate.py --workdir=runs/scenes --out=runs/scenes/metrics.json

Writes the metrics and, beside them, samples.png: conditions, samples of the base alone, samples under control.
"""

from absl import flags

from mcm_jax import cli
from mcm_jax.evaluation.evaluate import evaluate

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py, or the name of a shipped MCM")
_OUT = flags.DEFINE_string("out", None, "JSON file for the metrics")
_MAPS = flags.DEFINE_integer("maps", None, "Held-out maps; default: the config's evaluation.maps")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Modality guidance scale; default: the config's")
_TEXT = flags.DEFINE_float("text_guidance", None, "Classifier-free guidance scale; default: the config's")
_MODULATE = flags.DEFINE_enum("modulate", None, ["after_cfg", "before_cfg"], "Default: the config's")
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the config's")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise")


def main(argv: list[str]) -> None:
    del argv
    evaluate(
        _WORKDIR.value,
        _OUT.value,
        maps=_MAPS.value,
        guidance=_GUIDANCE.value,
        text_guidance=_TEXT.value,
        modulate=_MODULATE.value,
        steps=_STEPS.value,
        seed=_SEED.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
