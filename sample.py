"""Samples from a frozen base under an MCM's control.

python sample.py --segmentation=docs/examples/segmentation.png --sketch=docs/examples/sketch.png --out=runs/samples

Either may be left out; any other modality is --condition=NAME=PICTURE. Of many pictures (docs/sampling.md, lists):

python sample.py --jobs=jobs.jsonl --out=runs/list      # or --conditions=FOLDER; the same command goes on
python sample.py --replay=runs/list/000001.png --out=runs/again

--workdir is a folder that train.py made, or the name of a shipped MCM. Strengths, windows, masks, pictures to begin
with, sampler, steps and what else docs/sampling.md has are flags as well, which --helpfull lists.
"""

from absl import flags

from mcm_jax import cli, jobs
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.sampling import SamplingSettings

_WORKDIR = flags.DEFINE_multi_string("workdir", ["scenes-mcm"], "Of train.py, or a shipped name; several act together")
_OUT = flags.DEFINE_string("out", None, "Folder for the samples, a grid of them and a JSON that repeats the run")
_CONDITIONS = {
    "segmentation": flags.DEFINE_string("segmentation", None, "PNG, classes or classes.json's colours, any size"),
    "sketch": flags.DEFINE_string("sketch", None, "PNG, black lines on white, any size"),
}
_OTHERS = flags.DEFINE_multi_string("condition", [], "NAME=PICTURE, for any other modality of the MCM; may be repeated")
_JOBS = flags.DEFINE_string("jobs", None, "File with one JSON object a line, each a picture to draw")
_FOLDER = flags.DEFINE_string("conditions", None, "Folder laid out as a data folder's split: a picture for each name")
_REPLAY = flags.DEFINE_string("replay", None, "PNG of this script, to be drawn again; what else is typed is otherwise")
_ONE = (
    flags.DEFINE_integer("num_samples", None, "How many. Default: 8"),
    flags.DEFINE_bool("show_base", None, "In grid.png, below each sample the base alone from the same noise"),
    flags.DEFINE_integer("intermediates", None, "So many steps in intermediates.png: where and when the MCM acts"),
)
_SHEET = flags.DEFINE_integer("sheet", 0, "So many of a list's pictures, conditions and the base alone in sheet.png")
_PREVIEW = flags.DEFINE_integer("preview_every", 0, "Steps after which preview.png shows what is drawn now; 0: none")
_BASE = cli.define_base_flags()
_CONTROLS, _SETTINGS = cli.define_flags(jobs.Job, jobs.CONTROLS, ""), cli.define_flags(SamplingSettings)


def main(argv: list[str]) -> object:
    del argv
    if odd := [text for text in _OTHERS.value if "=" not in text]:
        raise UserError(f"--condition={odd[0]}: expected NAME=PICTURE, e.g. --condition=depth=depth.png")
    conditions = {name: flag.value for name, flag in _CONDITIONS.items() if flag.value}
    conditions |= dict(text.split("=", 1) for text in _OTHERS.value)
    one = {flag.name: flag.value for flag in _ONE if flag.value is not None}
    given = [flag for flag in (_JOBS, _FOLDER, _REPLAY) if flag.value]
    single = ", ".join(f"--{flag.name}" for flag in _ONE)
    if given and (len(given) > 1 or conditions or one):
        raise UserError(f"--{given[0].name}: goes with no condition, no other list, no {single}")
    typed, base, preview = _CONTROLS() | _SETTINGS(), _BASE(), {"preview_every": _PREVIEW.value}
    if _SHEET.value and not (_JOBS.value or _FOLDER.value):
        raise UserError("--sheet: goes with --jobs or --conditions; a single run has its grid.png")
    if _REPLAY.value:
        workdir = _WORKDIR.value if _WORKDIR.present else None
        return jobs.replay(_REPLAY.value, _OUT.value, workdir, **preview, **base, **typed)
    if not given:
        return generate(_WORKDIR.value, conditions, _OUT.value, **one, **preview, **base, **typed)
    drawer = jobs.Drawer(_WORKDIR.value, **base, **_SETTINGS())
    read = jobs.read_jobs if _JOBS.value else jobs.jobs_of_folder
    todo, problems = read(given[0].value, drawer, **typed)
    return drawer.draw(todo, _OUT.value, problems, **preview, sheet=_SHEET.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["out"])
    cli.run(main)
