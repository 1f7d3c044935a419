"""The evaluation of a run: does control work, for every subset of the modalities, and what does it cost in diversity?

Samples for held-out maps are segmented by a net that neither the base nor the MCM has seen (:mod:`.segmenter`).
Beside the subsets stand two bounds: real images of the same maps, and the base alone, which cannot know the maps.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mcm_jax import assets, config, pictures, sampling
from mcm_jax.data import DataSettings
from mcm_jax.data.scenes import scene_at
from mcm_jax.errors import UserError, expect
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.control import ScenesJudge
from mcm_jax.evaluation.facts import facts_of, load_facts_net
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.mcm import parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.version import __version__

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What evaluate.py samples. The config's section ``evaluation``.

    Attributes:
      maps: held-out maps.
      diversity_conditions: of these, how many are sampled several times.
      diversity_seeds: how often.
      expected: shown beside the table, by the name of the row.
    """

    maps: int = 256
    diversity_conditions: int = 16
    diversity_seeds: int = 4
    expected: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"both": "", "base": ""})

    def __post_init__(self):
        expect(self.maps >= 1, "maps", "at least 1", self.maps)
        expect(self.diversity_conditions >= 1, "diversity_conditions", "at least 1", self.diversity_conditions)
        expect(self.diversity_seeds >= 0, "diversity_seeds", "at least 0", self.diversity_seeds)


@dataclasses.dataclass(frozen=True)
class _RunSettings:
    """What a workdir says of its evaluation."""

    data: DataSettings
    evaluation: EvaluationSettings


def _subsets(names: list[str]) -> dict[str, list[str]]:
    """What is given in each run: everything (``both`` where there are two), then each modality alone."""
    everything = {"both" if len(names) == 2 else "all": names} if len(names) > 1 else {}
    return everything | {name: [name] for name in names}


def _table(result: dict) -> str:
    expected = result["expected"]
    texts = f"{'facts':>8}" if result["facts"] else ""
    lines = [f"{'':16}{'mean IoU':>10}{'sketch F1':>11}{'diversity':>11}{texts}   expected mean IoU"]
    for name, miou in result["miou"].items():
        diversity = result["diversity"].get(name)
        texts = f"{result['facts'][name]['mean']:8.3f}" if result["facts"] else ""
        lines.append(
            f"{name:16}{miou:10.3f}{result['edge_f1'][name]['f1']:11.3f}"
            f"{'' if diversity is None else format(diversity, '.3f'):>11}{texts}   {expected.get(name, '')}"
        )
    return "\n".join(lines)


def evaluate(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    maps: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> dict:
    """Evaluates a trained MCM and writes ``out`` (JSON) and ``samples.png`` beside it.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      out: file for the metrics.
      maps: how many held-out maps; None takes ``config.evaluation.maps``.
      seed: of the noise.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that shall differ from the config's; None is as
        there.

    Returns:
      What is written: ``miou`` (over all pixels of all maps, mean over classes; keys ``real``, ``base``, ``both``, each
      modality; ``unprompted``, a text-conditional base that is not told the caption), ``class_iou``, ``edge_f1``
      (precision, recall and F1 of the samples' edges against the sketches, within one pixel), ``facts`` (for a
      text-conditional base: in what share of the samples each thing that the caption says holds, by another net),
      ``diversity`` (mean root-mean-square distance, in units of the [-1, 1] range, between samples of several seeds for
      one condition) and what it was measured with.

    Raises:
      UserError: bad input; nothing was written.
    """
    pipeline = Pipeline.from_folder(workdir)
    run = config.load(_RunSettings, assets.resolve(os.fspath(workdir)), others=True)
    if run.data.name != "scenes":
        raise UserError(
            f"{workdir}: trained on data.name={run.data.name!r}; evaluate.py measures control over scenes, whose "
            f"segmentation net it has, and over nothing else yet"
        )
    wanted = run.evaluation
    maps = wanted.maps if maps is None else maps
    expect(maps >= 1, "maps", "at least 1", maps)
    expect(0 <= seed < 2**32, "seed", "in 0..4294967295", seed)
    settings = pipeline.settings.but(**changes)
    settings.check_for(pipeline.base.schedule)
    out = pathlib.Path(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected the name of a JSON file")
    check_writable(out.parent, "--out")
    modalities = pipeline.modulator.modalities
    judge = ScenesJudge(run.data.seed, maps, pipeline.base.card, modalities)
    examples = judge.examples
    conditions = {m.name: m.resize_all(examples[m.name], *pipeline.base.latent_shape[:2]) for m in modalities}
    prompts = np.array([str(caption) for caption in examples["caption"]])

    def sample(
        given: list[str], scale: float, keys: jax.Array, rows: np.ndarray | slice = slice(None), told: bool = True
    ) -> np.ndarray:
        """Samples under some of the modalities, for all maps or for some rows of them, within [-1, 1].

        A text-conditional base is told the captions, or the empty prompt.
        """
        text = list(prompts[rows]) if told and pipeline.base.is_text_conditional else None
        kept = {name: conditions[name][rows] for name in given}
        how = dataclasses.asdict(settings.but(guidance=scale))
        return np.clip(pipeline(kept, keys, prompts=text, **how), -1, 1)

    keys = sampling.sample_keys(seed, maps)
    chosen = min(wanted.diversity_conditions, maps)
    seeds = wanted.diversity_seeds

    result = {"miou": {}, "class_iou": {}, "edge_f1": {}, "diversity": {}, "facts": {}}
    facts_net = load_facts_net() if pipeline.base.is_text_conditional else None
    facts = facts_of([scene_at(run.data.seed, "test", i).facts for i in range(maps)]) if facts_net else {}

    def score(name: str, images: np.ndarray) -> None:
        for key, value in judge.details(images).items():
            result[key][name] = value
        if facts_net:
            seen = facts_net.predict(judge.reduce(images))
            right = {fact: float((seen[fact] == facts[fact]).mean()) for fact in facts}
            result["facts"][name] = right | {"mean": sum(right.values()) / len(right)}

    def spread(name: str, given: list[str], scale: float) -> None:
        """Diversity over several seeds a condition."""
        if seeds < 2:
            return
        rows = np.repeat(np.arange(chosen)[None], seeds, axis=0).reshape(-1)
        many = sample(given, scale, sampling.sample_keys(seed + 1, len(rows)), rows)
        result["diversity"][name] = float(metrics.diversity(many.reshape(seeds, chosen, *many.shape[1:])))

    began = time.perf_counter()
    score("real", examples["image"])
    if facts_net:
        score("unprompted", sample([], 0.0, keys, told=False))
    alone = sample([], 0.0, keys)
    score("base", alone)
    spread("base", [], 0.0)
    shown = [pictures.show(m, examples[m.name][:_SHOWN]) for m in modalities] + [pictures.to_uint8(alone[:_SHOWN])]
    for name, given in _subsets([m.name for m in modalities]).items():
        images = sample(given, settings.guidance, keys)
        score(name, images)
        spread(name, given, settings.guidance)
        shown.append(pictures.to_uint8(images[:_SHOWN]))

    result |= {
        "expected": dict(wanted.expected),
        "maps": maps,
        "guidance": settings.guidance,
        "text_guidance": settings.text_guidance if pipeline.base.is_text_conditional else None,
        "modulate": settings.modulate if pipeline.base.is_text_conditional else None,
        "negative_prompt": settings.negative_prompt if pipeline.base.is_text_conditional else None,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "eta": settings.eta,
        "seed": seed,
        "diversity_of": {"conditions": chosen, "seeds": seeds},
        "mcm_parameters": parameter_count(pipeline.params),
        "base_parameters": parameter_count(pipeline.base.params["unet"]),
        "mcm_step": pipeline.step,
        "base": pipeline.base.name,
        "fingerprint": pipeline.base.fingerprint,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"mcm_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    print(_table(result))
    pictures.save_png(out.parent / "samples.png", pictures.grid(shown))
    write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
    rows = ", ".join([*(m.name for m in modalities), "base alone", *_subsets([m.name for m in modalities])])
    print(f"\n{maps} held-out maps, guidance {settings.guidance:g}. Rows of {out.parent / 'samples.png'}: {rows}")
    return result
