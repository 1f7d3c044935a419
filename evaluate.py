"""Measures the control of a trained MCM on held-out examples.

python evaluate.py --workdir=runs/scenes --out=runs/scenes/metrics.json

Writes the metrics and, beside them, report.md and report.html: tables, samples, best and worst cases. The same command
goes on with an evaluation that was stopped.
"""

import dataclasses

from absl import flags

from mcm_jax import cli
from mcm_jax.errors import UserError
from mcm_jax.evaluation.evaluate import EvaluationSettings, evaluate
from mcm_jax.sampling import SamplingSettings

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of train.py, or the name of a shipped MCM")
_OUT = flags.DEFINE_string("out", None, "JSON file for the metrics")
_EVALUATION = cli.define_flags(EvaluationSettings, ["maps", "seeds", "strengths", "references"])
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise")
_JUDGE = flags.DEFINE_multi_string(
    "judge",
    [],
    "MODALITY=HOW, what judges a modality: palette:FILE.json, module:function, FILE.onnx, the folder of a judge, "
    "edges, ms_ssim, colour, depth:reader=FILE.onnx, pck:reader=module:function, none; caption=clip:FOLDER, the folder "
    "of a CLIP; fidelity=inception:FILE.safetensors, by what features FID and KID are",
)
# Held-out pictures are of the base's size, and none is begun with.
_OTHERS = ("image_strength", "height", "width")
_BASE, _SETTINGS = (
    cli.define_base_flags(),
    cli.define_flags(SamplingSettings, [f.name for f in dataclasses.fields(SamplingSettings) if f.name not in _OTHERS]),
)


def main(argv: list[str]) -> None:
    del argv
    judges = dict(text.partition("=")[::2] for text in _JUDGE.value)
    if odd := [name for name, how in judges.items() if not (name and how)]:
        raise UserError(f"--judge={odd[0]}: expected MODALITY=HOW, e.g. --judge=segmentation=palette:colours.json")
    evaluate(
        _WORKDIR.value,
        _OUT.value,
        seed=_SEED.value,
        judges=judges,
        **_EVALUATION(),
        **_BASE(),
        **_SETTINGS(),
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    cli.run(main)
