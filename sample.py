"""Samples from a frozen base under an MCM's control.

python sample.py --segmentation=docs/examples/segmentation.png --sketch=docs/examples/sketch.png --out=runs/samples

Either condition may be left out. --workdir is a folder that train.py made, or the name of a shipped MCM. Sampler,
steps, guidance and what else docs/sampling.md has are flags as well, which --helpfull lists.
"""

from absl import flags

from mcm_jax import cli
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.sampling import SamplingSettings

_WORKDIR = flags.DEFINE_string("workdir", "scenes-mcm", "Workdir of train.py, or the name of a shipped MCM")
_OUT = flags.DEFINE_string("out", None, "Folder for the samples, a grid of them and a JSON that repeats the run")
_CONDITIONS = {
    "segmentation": flags.DEFINE_string(
        "segmentation", None, "PNG with one class a pixel, or in the colours of classes.json; any size"
    ),
    "sketch": flags.DEFINE_string("sketch", None, "PNG, black lines on white, any size"),
}
_OTHERS = flags.DEFINE_multi_string("condition", [], "NAME=PICTURE, for any other modality of the MCM; may be repeated")
_NUM = flags.DEFINE_integer("num_samples", 8, "How many")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise; sample i of a seed is the same for any num_samples")
_PROMPT = flags.DEFINE_string("prompt", None, "Text, for a text-conditional base; default: the empty one")
_SETTINGS = cli.define_flags(SamplingSettings)


def main(argv: list[str]) -> None:
    del argv
    if odd := [text for text in _OTHERS.value if "=" not in text]:
        raise UserError(f"--condition={odd[0]}: expected NAME=PICTURE, e.g. --condition=depth=depth.png")
    conditions = {name: flag.value for name, flag in _CONDITIONS.items() if flag.value}
    generate(
        _WORKDIR.value,
        conditions | dict(text.split("=", 1) for text in _OTHERS.value),
        _OUT.value,
        num_samples=_NUM.value,
        seed=_SEED.value,
        prompt=_PROMPT.value,
        **_SETTINGS(),
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["out"])
    cli.run(main)
