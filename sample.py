"""Samples from a frozen base under an MCM's control.

python sample.py --segmentation=docs/examples/segmentation.png --sketch=docs/examples/sketch.png --out=runs/samples

Either condition may be left out. A list of pictures, each with its own conditions and settings (docs/sampling.md):

python sample.py --jobs=jobs.jsonl --out=runs/list      # or --conditions=FOLDER; the same command goes on
python sample.py --replay=runs/list/000001.png --out=runs/again

--workdir is a folder that train.py made, or the name of a shipped MCM. Sampler, steps, guidance and what else
docs/sampling.md has are flags as well, which --helpfull lists.
"""

from absl import flags

from mcm_jax import cli, jobs
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
_JOBS = flags.DEFINE_string("jobs", None, "File with one JSON object a line, each a picture to draw")
_FOLDER = flags.DEFINE_string("conditions", None, "Folder laid out as a data folder's split: a picture for each name")
_REPLAY = flags.DEFINE_string("replay", None, "PNG of this script, to be drawn again; what else is typed is otherwise")
_NUM = flags.DEFINE_integer("num_samples", None, "How many. Default: 8")
_SEED = flags.DEFINE_integer("seed", None, "Of the noise; sample i is the same for any num_samples. Default: 0")
_PROMPT = flags.DEFINE_string("prompt", None, "Text, for a text-conditional base; default: the empty one")
_BASE, _SETTINGS = cli.define_base_flags(), cli.define_flags(SamplingSettings)


def main(argv: list[str]) -> object:
    del argv
    if odd := [text for text in _OTHERS.value if "=" not in text]:
        raise UserError(f"--condition={odd[0]}: expected NAME=PICTURE, e.g. --condition=depth=depth.png")
    conditions = {name: flag.value for name, flag in _CONDITIONS.items() if flag.value}
    conditions |= dict(text.split("=", 1) for text in _OTHERS.value)
    own, lists = {"seed": _SEED.value, "prompt": _PROMPT.value}, (_JOBS, _FOLDER, _REPLAY)
    given = [f"--{flag.name}" for flag in lists if flag.value]
    if len(given) > 1 or (given and (conditions or _NUM.value is not None)):
        raise UserError(f"{given[0]} says what is drawn: it goes with no condition, --num_samples or other list")
    if _REPLAY.value:
        workdir = _WORKDIR.value if _WORKDIR.present else None
        return jobs.replay(_REPLAY.value, _OUT.value, workdir, **own, **_BASE(), **_SETTINGS())
    own["seed"] = own["seed"] or 0
    if given:
        drawer, problems = jobs.Drawer(_WORKDIR.value, **_BASE(), **_SETTINGS()), []
        if _JOBS.value:
            todo, problems = jobs.read_jobs(_JOBS.value, drawer, **own)
        else:
            todo = jobs.jobs_of_folder(_FOLDER.value, drawer, **own)
        drawer.draw(todo, _OUT.value, problems)
        return None
    number = 8 if _NUM.value is None else _NUM.value
    settings = _BASE() | _SETTINGS()
    return generate(_WORKDIR.value, conditions, _OUT.value, num_samples=number, **own, **settings)


if __name__ == "__main__":
    flags.mark_flags_as_required(["out"])
    cli.run(main)
