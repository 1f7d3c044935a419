"""The evaluation of a run: does control work, for every subset of the modalities, and what does it cost in diversity?

What is sampled stands in :mod:`.rows`, what judges in :mod:`.judges`, what is written in :mod:`.report`; this module
goes through the rows, one after the other, and keeps what each gave, so that the same command goes on.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
import tqdm

from mcm_jax import assets, config, pictures, sampling
from mcm_jax.data import DataSettings
from mcm_jax.errors import Interrupted, UserError, expect
from mcm_jax.evaluation import metrics, report
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, flatten, judges_of
from mcm_jax.evaluation.parts import Parts
from mcm_jax.evaluation.rows import Row, Sampler, rows_of, subsets
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.mcm import parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import check_text
from mcm_jax.trained import WEIGHTS
from mcm_jax.version import __version__

_SHOWN = 10  # pictures of a row in samples.png
_CASES = 8  # best and worst ones
_BATCH = 32  # pictures through the autoencoder


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What evaluate.py samples, and what judges it. The config's section ``evaluation``.

    Attributes:
      maps: held-out examples; of a folder at most as many as its test split has.
      seeds: how often each is sampled; from 2 on, numbers are means with 95% intervals over the seeds.
      strengths: modality guidance scales beside the sampling's own.
      judges: what judges a modality, or the `caption`, by its name (docs/evaluation.md); '' is the data set's own, or
        for lines `edges`. `fidelity`: by what features sets are compared; '' is those of the labels' net.
      references: training pictures that samples are compared with, as sets (FID, KID, the nearest); 0 leaves it out.
      diversity_conditions: of the examples, how many are sampled several times for the diversity.
      diversity_seeds: how often; 0 or 1 leaves it out.
      expected: shown beside the table, by the name of the row.
    """

    maps: int = 256
    seeds: int = 1
    strengths: tuple[float, ...] = ()
    judges: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("segmentation", "sketch", "caption", "fidelity"), "")
    )
    references: int = config.setting(1_000, before=0)
    diversity_conditions: int = 16
    diversity_seeds: int = 4
    expected: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"both": "", "base": ""})

    def __post_init__(self):
        expect(self.maps >= 1, "maps", "at least 1", self.maps)
        expect(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        expect(all(0 < s < float("inf") for s in self.strengths), "strengths", "above 0", self.strengths)
        expect(self.references >= 0, "references", "at least 0", self.references)
        compared = self.judges.get("fidelity", "")
        wanted = f"at least 1 for judges.fidelity={compared} (evaluate.py --references=1000)"
        expect(self.references or compared in ("", "none"), "references", wanted, self.references)
        expect(self.diversity_conditions >= 1, "diversity_conditions", "at least 1", self.diversity_conditions)
        expect(self.diversity_seeds >= 0, "diversity_seeds", "at least 0", self.diversity_seeds)


@dataclasses.dataclass(frozen=True)
class _RunSettings:
    """What a workdir says of its evaluation."""

    data: DataSettings
    evaluation: EvaluationSettings


def evaluate(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    maps: int | None = None,
    seeds: int | None = None,
    strengths: Sequence[float] | None = None,
    seed: int = 0,
    judges: Mapping[str, str] | None = None,
    references: int | None = None,
    base: str | None = None,
    accept_base: bool = False,
    dtype: str | None = None,
    **changes: Any,
) -> dict:
    """Evaluates a trained MCM; writes ``out`` (JSON) and, beside it, ``report.md``, ``report.html`` and their pictures.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      out: file for the metrics. While the evaluation runs, ``OUT.parts/`` keeps what is done.
      maps: how many held-out examples; None takes ``config.evaluation.maps``.
      seeds: how often each is sampled; None takes ``config.evaluation.seeds``.
      strengths: modality guidance scales beside the sampling's own; None takes ``config.evaluation.strengths``.
      seed: of the noise.
      judges: what judges a modality, or the ``caption``, by its name, in place of the config's.
      references: training pictures that samples are compared with; None takes ``config.evaluation.references``.
      base: another place of the base; None is the config's.
      accept_base: whether it may be a fine-tune of the MCM's own, see :meth:`mcm_jax.pipeline.Pipeline.from_folder`.
      dtype: what is computed in, see there; None is the config's.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that shall differ from the config's; None is as
        there.

    Returns:
      What is written, each number by its name and the row:

      * of labels ``miou`` (over all pixels of all maps, mean over classes) and ``class_iou``; of lines ``edge_f1``
        (precision, recall and F1); of maps ``ms_ssim``, ``delta_e``, ``depth`` (RMSE and absolute relative error) or
        ``pck``, by what judges them;
      * ``clip_score`` of captions, where a CLIP judges them;
      * ``facts`` of scenes with a text: in what share of the samples each thing that the caption says holds;
      * ``fid``, ``kid`` and ``nearest``, where the judge of labels or of ``fidelity`` has features: see
        :mod:`.fidelity`;
      * ``diversity``: the mean root-mean-square distance, in units of the [-1, 1] range, between samples of several
        seeds for one condition;
      * ``examples``, where examples miss modalities: how many have each, which its numbers are of;
      * ``interval``, laid out the same: half of the 95% interval, of the mean over the seeds, or of FID and KID of one
        seed by the pictures; ``undefined``: why a number is null; and what it was measured with.

      Rows are ``real`` pictures; these through the ``autoencoder``; the base that is not told the caption
      (``unprompted``) and the ``base`` alone; ``shuffled``, the samples of everything judged by another example's
      conditions, which is what chance gives; and each subset of the modalities.

    Raises:
      UserError: bad input; nothing was written.
      Interrupted: Ctrl-C; the same command goes on.
    """
    pipeline = Pipeline.from_folder(workdir, base=base, accept_base=accept_base, dtype=dtype)
    run = config.load(_RunSettings, assets.resolve(os.fspath(workdir)), others=True)
    wanted = run.evaluation
    changed = {
        "maps": maps,
        "seeds": seeds,
        "strengths": strengths,
        "references": references,
        "judges": {**wanted.judges, **(judges or {})},
    }
    wanted = dataclasses.replace(wanted, **{k: v for k, v in changed.items() if v is not None})
    expect(0 <= seed < 2**32, "seed", "in 0..4294967295", seed)
    settings = pipeline.settings.but(**changes).but(height=0, width=0)  # the base's size, as held-out pictures have
    settings.check_for(pipeline.base.schedule)
    check_text(pipeline.base, changes, "--")
    out = pathlib.Path(out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected the name of a JSON file")
    if out.exists() and not _is_ours(out):
        raise UserError(f"--out {out}: is there and no evaluation's metrics, which may be replaced; take another name")
    check_writable(out.parent, "--out")
    modalities = pipeline.modalities
    held_out = HeldOut(run.data, pipeline.base.card, modalities, wanted.maps)
    of_all = judges_of(held_out, wanted.judges, wanted.references)
    is_text = pipeline.base.is_text_conditional
    gaps = {name: int(has.sum()) for name, has in held_out.present.items() if not has.all()}
    measured = {
        "maps": len(held_out),
        "seeds": wanted.seeds,
        "guidance": settings.guidance,
        "text_guidance": settings.text_guidance if is_text else None,
        "modulate": settings.modulate if is_text else None,
        "negative_prompt": settings.negative_prompt if is_text else None,
        "text_rescale": settings.text_rescale if is_text else None,
        "sampler": settings.sampler or pipeline.base.schedule.solver,
        "schedule": pipeline.base.schedule.options,
        "steps": settings.steps,
        "eta": settings.eta,
        "spacing": settings.spacing,
        "timesteps": list(settings.timesteps),
        "start": settings.start,
        "end": settings.end,
        "guidance_schedule": list(settings.guidance_schedule),
        "seed": seed,
        "strengths": list(wanted.strengths),
        "diversity_of": {
            "conditions": min(wanted.diversity_conditions, len(held_out)),
            "seeds": wanted.diversity_seeds,
        },
        "judges": {judge.name: judge.how for judge in of_all},
        **({"examples": gaps} if gaps else {}),
        "data": dataclasses.asdict(run.data),
        "mcm_parameters": parameter_count([mcm.params for mcm in pipeline.mcms]),
        "base_parameters": parameter_count(pipeline.base.params["unet"]),
        "mcm_step": pipeline.mcms[0].step,
        "base": pipeline.base.name,
        "fingerprint": pipeline.base.fingerprint,
        **({"dtype": pipeline.dtype} if pipeline.dtype else {}),
        "versions": {"mcm_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    began = time.perf_counter()
    weights = hashlib.sha256((assets.resolve(os.fspath(workdir)) / WEIGHTS).read_bytes()).hexdigest()
    parts = Parts(out.with_name(out.name + ".parts"), {**measured, "weights": weights})
    names = [m.name for m in modalities]
    rows = rows_of(names, settings.guidance, wanted.strengths, is_text)
    try:
        found = _measure(rows, Sampler(pipeline, held_out, settings), held_out, of_all, measured, parts, pipeline)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what is done is kept in {parts.folder}. The same command goes on") from None
    result = _summed_up(found) | {"expected": dict(wanted.expected)} | measured
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(report.as_text(result, of_all))
    first = slice(_SHOWN)
    shown = [
        pictures.show(m, held_out.conditions[m.name][first], run.data.palette(m.name), held_out.present[m.name][first])
        for m in modalities
    ]
    drawn = ["base", *subsets(names)]
    pictures.save_png(out.parent / "samples.png", pictures.grid([*shown, *(found[name].shown for name in drawn)]))
    cases = _cases(found[drawn[1]], of_all, held_out, names)
    for name, (_, sheet) in cases.items():
        pictures.save_png(out.parent / f"cases_{name}.png", sheet)
    given = [f"{name} only" if name in names else name for name in drawn[1:]]
    drawn_rows = f"{', '.join(names)}; samples of the base alone, {', '.join(given)}"
    sheets = {"samples.png": f"Rows: {drawn_rows}."}
    sheets |= {f"cases_{name}.png": said for name, (said, _) in cases.items()}
    report.write(out.parent, result, of_all, sheets, title=os.fspath(workdir))
    write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
    shutil.rmtree(parts.folder, ignore_errors=True)
    having = "".join(f", {count} of them with a {name}" for name, count in gaps.items())
    print(
        f"\n{len(held_out)} held-out maps{having}, guidance {settings.guidance:g}. {out.parent / 'report.html'} has it "
        f"all; rows of {out.parent / 'samples.png'}: {drawn_rows}"
    )
    return result


@dataclasses.dataclass
class _Measured:
    """What a row gave: numbers of each seed, and of the first one intervals, scores by judge and some pictures."""

    numbers: list[dict[str, float | str]] = dataclasses.field(default_factory=list)
    within: dict[str, float] = dataclasses.field(default_factory=dict)
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shown: np.ndarray | None = None
    cases: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def add(self, judged: Mapping[str, dict], arrays: Mapping[str, np.ndarray]) -> None:
        """Adds a seed, what :func:`_judged` gave of it."""
        self.numbers.append(judged["numbers"])
        if len(self.numbers) == 1:
            self.within, self.shown = judged["within"], arrays["shown"]
            self.scores = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("scores/")}
            self.cases = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("cases/")}


def _judged(
    judges: Sequence[Judge], images: np.ndarray, which: np.ndarray
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """What judges say of pictures for some of the examples, and which pictures are kept: as :class:`Parts` keeps it."""
    numbers, within, arrays = {}, {}, {"shown": pictures.to_uint8(images[:_SHOWN])}
    for judge in judges:
        judgement = judge(images, which)
        numbers |= flatten(judgement.numbers)
        within |= judgement.within
        if judgement.scores is not None:
            arrays[f"scores/{judge.name}"] = judgement.scores
            arrays[f"cases/{judge.name}"] = pictures.to_uint8(
                images[_chosen(judgement.scores, judge.judges_which(which))]
            )
    return {"numbers": numbers, "within": within}, arrays


def _measure(
    rows: Sequence[Row],
    sampler: Sampler,
    held_out: HeldOut,
    judges: Sequence[Judge],
    measured: Mapping[str, Any],
    parts: Parts,
    pipeline: Pipeline,
) -> dict[str, _Measured]:
    """Samples and judges every row; what is kept already is not sampled again."""
    count, everyone = len(held_out), np.arange(len(held_out))
    seeds, seed, of = measured["seeds"], measured["seed"], measured["diversity_of"]
    spread = of["conditions"] * of["seeds"] if of["seeds"] >= 2 else 0
    conditional = [judge for judge in judges if judge.conditional]
    found: dict[str, _Measured] = collections.defaultdict(_Measured)

    def sampled(row: Row, number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        # The first seed's noise is that of evaluations with one; no other seed's is a sample's elsewhere.
        images = sampler(row, sampling.sample_keys((seed + 2 * number) % 2**32, count), everyone, bar.update)
        own, arrays = _judged(judges, images, everyone)
        if row != everything or count == 1:
            return {"own": own}, arrays
        return {"own": own, "shuffled": _judged(conditional, images, np.roll(everyone, 1))[0]}, arrays

    def spread_of(row: Row) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        which = np.tile(np.arange(of["conditions"]), of["seeds"])
        many = sampler(row, sampling.sample_keys((seed + 1) % 2**32, len(which)), which, bar.update)
        return {"diversity": float(metrics.diversity(many.reshape(of["seeds"], of["conditions"], *many.shape[1:])))}, {}

    judged, arrays = _judged(judges, held_out.images, everyone)
    parts.check(judged["numbers"])
    found["real"].add(judged, arrays)
    if pipeline.base.is_latent:
        found["autoencoder"].add(*_judged(judges, _through_autoencoder(pipeline, held_out.images), everyone))
    everything = next(row for row in rows if row.given)
    done, total = 0, len(rows) * (count * seeds + spread)
    with tqdm.tqdm(total=total, unit="picture", dynamic_ncols=True) as bar:
        for row in rows:
            bar.set_description(row.name)
            for number in range(seeds):
                numbers, arrays = parts.kept(f"{row.name}, seed {number}", functools.partial(sampled, row, number))
                found[row.name].add(numbers["own"], arrays)
                if "shuffled" in numbers:
                    found["shuffled"].add(numbers["shuffled"], arrays)
                done += count
                bar.update(done - bar.n)  # of what was kept
            if spread:
                found[row.name].numbers[0] |= parts.kept(f"{row.name}, diversity", functools.partial(spread_of, row))[0]
                done += spread
                bar.update(done - bar.n)
    order = ["real", "autoencoder", "unprompted", "base", "shuffled"]
    return {name: found[name] for name in [*filter(found.__contains__, order), *(r.name for r in rows if r.given)]}


def _through_autoencoder(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Pictures encoded and decoded: no sample of a latent base can be truer to them."""
    base = pipeline.base
    both = jax.jit(lambda params, images: base.decode(params, base.encode(params, images)))
    out = []
    for start in range(0, len(images), _BATCH):
        rows = (start + np.arange(_BATCH)) % len(images)
        found = np.asarray(both(base.params, images[rows]), np.float32)
        if not np.isfinite(found).all():
            raise UserError("the base's autoencoder makes NaN of real pictures; take config.base.dtype=float32")
        out.append(np.clip(found, -1, 1))
    return np.concatenate(out)[: len(images)]


def _chosen(scores: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Which are shown of a row, out of `among` (bool ``[N]``): the worst ones, then the best ones."""
    order = np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    order = order if among is None else order[among[order]]
    few = min(_CASES, max(1, len(order) // 2))
    return np.concatenate([order[:few], order[len(order) - few :]])


def _cases(
    row: _Measured, judges: Sequence[Judge], held_out: HeldOut, names: Sequence[str]
) -> dict[str, tuple[str, np.ndarray]]:
    """Sheets of each judge's worst and best samples, below their conditions, with what to say of them."""
    sheets = {}
    by_name = {m.name: m for m in held_out.judged}
    for judge in judges:
        if judge.name not in row.scores:
            continue
        chosen = _chosen(row.scores[judge.name], judge.of)
        conditions = [
            pictures.show(
                by_name[name],
                held_out.conditions[name][chosen],
                held_out.data.palette(name),
                held_out.present[name][chosen],
            )
            for name in names
        ]
        real = pictures.to_uint8(held_out.images[chosen])
        scores = ["undefined" if np.isnan(s) else f"{s:.2f}" for s in row.scores[judge.name][chosen]]
        values = ", ".join(f"{score} ({held_out.names[i]})" for score, i in zip(scores, chosen, strict=True))
        said = f"The worst {len(chosen) // 2} by {judge.name}, then the best: {values}."
        said += f" Rows: {', '.join(names)}, real, sample."
        sheets[judge.name] = said, pictures.grid([*conditions, real, row.cases[judge.name]])
    return sheets


def _is_ours(file: pathlib.Path) -> bool:
    """Whether a file holds the metrics of an evaluation."""
    try:
        return "mcm_parameters" in json.loads(file.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _summed_up(found: Mapping[str, _Measured]) -> dict[str, Any]:
    """Means over the seeds, by number and row, with their intervals; null, and a word on why, for what is undefined."""
    result: dict[str, Any] = {"diversity": {}, "interval": {}, "undefined": {}}

    def put(where: dict, path: str, row: str, value: float | None) -> None:
        name, _, key = path.partition(".")
        if key:
            where.setdefault(name, {}).setdefault(row, {})[key] = value
        else:
            where.setdefault(name, {})[row] = value

    for row, measured in found.items():
        for path in measured.numbers[0]:
            values = [numbers[path] for numbers in measured.numbers if path in numbers]
            defined = [v for v in values if not isinstance(v, str)]
            if not defined:
                result["undefined"][f"{path}.{row}"] = values[0]
            put(result, path, row, float(np.mean(defined)) if defined else None)
            if len(defined) > 1:
                put(result["interval"], path, row, interval(defined))
            elif path in measured.within:
                put(result["interval"], path, row, measured.within[path])
    return result


def interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean (Student's t)."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(spread * scipy.special.stdtrit(len(values) - 1, 0.975))
