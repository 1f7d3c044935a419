"""Judges: a name and a function from pictures and conditions to numbers. Nothing else knows which there are.

Which judge a modality has is said by a text (``evaluation.judges`` in a config, ``--judge`` of evaluate.py):

* labels: a reader of label maps (:mod:`.readers`): ``scenes``, ``palette:FILE.json``, ``module:function``,
  ``FILE.onnx``, or a folder of ``python -m mcm_jax.evaluation.judges train``. Judged by intersection over union; with
  ``interior:`` before it without the pixels that a border runs through.
* caption, which is no modality: ``clip:FOLDER``, a CLIP's folder. Judged by its CLIP score. For scenes and a base that
  is told captions, ``facts`` by itself.
* lines: ``edges``, or with its settings, ``edges:size=64,threshold=0.2,tolerance=2``. Judged by F1.
* map: ``ms_ssim``, ``colour:blank=white``, ``depth:align=1,reader=READER``, ``pck:alpha=0.1,reader=READER``, or
  ``edges``; a reader is ``module:function`` or ``FILE.onnx`` (:mod:`.maps`).
* normals: ``normals:reader=READER``. Judged by the mean angular error.
* sparse: ``colour``, where there is a colour.
* fidelity, of sets of pictures whatever their modalities: features (:mod:`.sets`): ``inception:FILE.safetensors``,
  ``module:function``, one of our nets that read labels, or '' for the judge of labels if it is one. Judged by FID, KID
  and the nearest training picture.
* ``none``: the modality is not judged.

Where nothing is said, it is the data set's own, or what the modality's name and kind say (:attr:`Modality.judge`).

A judge compares on the grid that its reader takes, with conditions that were read or drawn anew for it.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import lines, maps, readers
from mcm_jax.evaluation.judges.captions import captions
from mcm_jax.evaluation.judges.judge import Judge, Judgement, Number, flatten
from mcm_jax.evaluation.judges.labels import INTERIOR, labels
from mcm_jax.evaluation.judges.lines import edges
from mcm_jax.evaluation.judges.readers import open_reader
from mcm_jax.evaluation.judges.sets import likeness, open_features

__all__ = ["Judge", "Judgement", "Number", "flatten", "judges_of"]

_OF_KIND = {
    "lines": {"edges": edges},
    "map": maps.JUDGES | {"edges": edges},
    "normals": {"normals": maps.normals},
    "sparse": {"colour": maps.colour},
}
"""The judges of each kind of modality, by what a text begins with. Labels have readers."""

_CAN_BE = {
    "labels": readers.CAN_BE,
    "lines": lines.CAN_BE,
    "map": f"{maps.CAN_BE}, or {lines.CAN_BE}",
    "normals": maps.OF_NORMALS,
    "sparse": maps.OF_SPARSE,
}


def judges_of(held_out: HeldOut, specs: Mapping[str, str], references: int = 0) -> list[Judge]:
    """The judges of a data set's modalities, and of how like its training pictures samples are.

    Args:
      held_out: the examples, whose data set says which judges its modalities have by themselves.
      specs: others, by modality; that of the ``caption``; and ``fidelity``, the features by which sets are compared.
      references: training pictures that samples are compared with; 0 for no such comparison.

    Raises:
      UserError: a modality without a judge, or a judge that cannot be had: lists what can be given.
    """
    known = {m.name: m for m in held_out.judged}
    specs = {name: spec for name, spec in specs.items() if spec}
    caption, of_sets = specs.pop("caption", ""), specs.pop("fidelity", held_out.data.judges.get("fidelity", ""))
    if unknown := sorted(set(specs) - set(known)):
        raise UserError(
            f"evaluation.judges: {', '.join(unknown)} is no modality here; expected one of "
            f"{', '.join([*known, 'caption', 'fidelity'])}"
        )
    chosen = {name: specs.get(name) or held_out.data.judges.get(name, "") or m.judge for name, m in known.items()}
    made, seeing = [], []
    for name, spec in chosen.items():
        modality = known[name]
        if spec == "none":
            continue
        if not spec:
            coloured = modality.kind == "labels" and held_out.data.palette(name) is not None
            colours = f", e.g. --judge={name}=palette, by the colours that the data set knows" if coloured else ""
            raise UserError(
                f"there is no judge of the {modality.kind} {name!r}. Give one, --judge={name}=HOW (while training, "
                f"config.evaluation.judges.{name}){colours}: "
                f"{_CAN_BE[modality.kind]}; or --judge={name}=none to leave it out"
            )
        if not held_out.present[name].any():
            raise UserError(
                f"none of the {len(held_out)} held-out examples has a {name}, so nothing can be judged by it; "
                f"--judge={name}=none (while training, config.evaluation.judges.{name}) leaves it out"
            )
        by = _OF_KIND.get(modality.kind)
        if by is None:
            reader = open_reader(
                spec.removeprefix(INTERIOR),
                channels=modality.channels,
                palette=held_out.data.palette(name),
                names=held_out.data.classes(name),
            )
            seeing.append(reader)
            made.append(labels(modality, reader, held_out, spec.startswith(INTERIOR)))
        elif metric := by.get(spec.partition(":")[0]):
            made.append(metric(modality, spec, held_out))
        else:
            raise UserError(f"--judge={name}={spec}: no judge of {modality.kind}; expected {_CAN_BE[modality.kind]}")
    made = [_of_those_with_it(judge, held_out.present[judge.name]) for judge in made]
    made += captions(caption, held_out)
    if references and (seen := open_features(of_sets, seeing)):
        made.append(likeness(*seen, held_out, references))
    return _distinct(made)


def _of_those_with_it(judge: Judge, has: np.ndarray) -> Judge:
    """The judge, of the examples that have what it judges by, bool ``[N]``."""
    if has.all():
        return judge
    how = f"{judge.how}; of the {has.sum()} of {len(has)} held-out examples that have one"
    return dataclasses.replace(judge, how=how, of=has)


def _distinct(judges: list[Judge]) -> list[Judge]:
    """Where two judges give numbers of one name, each has its modality's name before it."""
    names = [judge.headline[0] for judge in judges]
    out = []
    for judge in judges:
        if names.count(judge.headline[0]) == 1:
            out.append(judge)
            continue

        def renamed(images: np.ndarray, which: np.ndarray, judge: Judge = judge) -> Judgement:
            found = judge(images, which)
            numbers, within = ({f"{judge.name}/{k}": v for k, v in of.items()} for of in (found.numbers, found.within))
            return Judgement(numbers, found.scores, within)

        more = {key: tuple(f"{judge.name}/{n}" for n in getattr(judge, key)) for key in ("headline", "watched")}
        out.append(dataclasses.replace(judge, judge=renamed, **more))
    return out
