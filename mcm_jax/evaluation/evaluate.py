"""The evaluation of a run: does control work, for every subset of the modalities, and what does it cost in diversity?

Samples for held-out maps are segmented by a net that neither the base nor the MCM has seen (:mod:`.segmenter`).
Beside the subsets stand two bounds: real images of the same maps, and the base alone, which cannot know the maps.
"""

import json
import os
import pathlib
import time

import jax
import numpy as np

from mcm_jax import pictures, sampling
from mcm_jax.data.pipeline import InMemory, to_float
from mcm_jax.data.scenes import CLASSES, Scenes, scene_at
from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.facts import facts_of, load_facts_net
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.mcm import parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.version import __version__

_SHOWN = 10


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
    guidance: float | None = None,
    text_guidance: float | None = None,
    modulate: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> dict:
    """Evaluates a trained MCM and writes ``out`` (JSON) and ``samples.png`` beside it.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      out: file for the metrics.
      maps: how many held-out maps; None takes ``config.evaluation.maps``.
      guidance: modality guidance scale; None takes the config's.
      text_guidance: classifier-free guidance scale of the captions; None takes the config's.
      modulate: ``after_cfg`` or ``before_cfg``; None takes the config's.
      steps: sampling steps; None takes the config's.
      seed: of the noise.

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
    config = pipeline.config
    if config.data.name != "scenes":
        raise UserError(
            f"{workdir}: trained on data.name={config.data.name!r}; evaluate.py measures control over scenes, whose "
            f"segmentation net it has, and over nothing else yet"
        )
    wanted = config.evaluation
    maps = wanted.maps if maps is None else maps
    if maps < 1:
        raise UserError(f"maps must be at least 1, got {maps}")
    guidance = config.sampling.guidance if guidance is None else guidance
    text_guidance = config.sampling.text_guidance if text_guidance is None else text_guidance
    modulate = modulate or config.sampling.modulate
    steps = config.sampling.steps if steps is None else steps
    sampling.check_settings(
        pipeline.base.schedule, seed=seed, guidance=guidance, text_guidance=text_guidance, steps=steps
    )
    out = pathlib.Path(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected the name of a JSON file")
    check_writable(out.parent, "--out")
    segmenter = load_segmenter()
    height, width, _ = pipeline.base.image_shape
    size = segmenter.config["height"]
    if height != width or height % size:
        raise UserError(
            f"the shipped segmentation net reads {size}x{size} pictures, or larger ones by a whole factor, but the "
            f"base {pipeline.base.name!r} makes {height}x{width}: its samples cannot be evaluated yet"
        )
    modalities = pipeline.modulator.modalities
    source = InMemory.render(Scenes("test", maps, height, width, config.data.seed))
    examples = to_float(source.arrays, [m.name for m in modalities if m.kind != "labels"])
    conditions = {m.name: m.resize_all(examples[m.name], *pipeline.base.latent_shape[:2]) for m in modalities}
    prompts = np.array([str(caption) for caption in examples["caption"]])
    # Judged at the segmentation net's resolution, against the same scenes drawn at it.
    small = source if height == size else InMemory.render(Scenes("test", maps, size, size, config.data.seed))
    labels, sketches = small.arrays["segmentation"], small.arrays["sketch"].astype(np.float32) / 255

    def sample(
        given: list[str], scale: float, keys: jax.Array, rows: np.ndarray | slice = slice(None), told: bool = True
    ) -> np.ndarray:
        """Samples under some of the modalities, for all maps or for some rows of them, within [-1, 1].

        A text-conditional base is told the captions, or the empty prompt.
        """
        text = {}
        if pipeline.base.is_text_conditional:
            text = {"text_guidance": text_guidance, "modulate": modulate}
            text["prompts"] = list(prompts[rows]) if told else None
        kept = {name: conditions[name][rows] for name in given}
        return np.clip(pipeline(kept, keys, guidance=scale, steps=steps, **text), -1, 1)

    def reduce(images: np.ndarray) -> np.ndarray:
        factor = height // size
        return images.reshape(-1, size, factor, size, factor, 3).mean(axis=(2, 4))

    keys = sampling.sample_keys(seed, maps)
    chosen = min(wanted.diversity_conditions, maps)
    seeds = wanted.diversity_seeds

    result = {"miou": {}, "class_iou": {}, "edge_f1": {}, "diversity": {}, "facts": {}}
    judge = load_facts_net() if pipeline.base.is_text_conditional else None
    facts = facts_of([scene_at(config.data.seed, "test", i).facts for i in range(maps)]) if judge else {}

    def score(name: str, images: np.ndarray) -> None:
        images = reduce(images)
        confusion = metrics.confusion_matrix(segmenter.predict(images), labels, len(CLASSES))
        result["miou"][name] = float(metrics.mean_iou(confusion))
        values = zip(CLASSES, metrics.class_iou(confusion), strict=True)
        # A class that is in no map and in no sample has no IoU.
        result["class_iou"][name] = {c: None if np.isnan(v) else float(v) for c, v in values}
        result["edge_f1"][name] = {k: float(v) for k, v in metrics.edge_f1(images, sketches).items()}
        if judge:
            seen = judge.predict(images)
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
    if judge:
        score("unprompted", sample([], 0.0, keys, told=False))
    alone = sample([], 0.0, keys)
    score("base", alone)
    spread("base", [], 0.0)
    shown = [pictures.show(m, examples[m.name][:_SHOWN]) for m in modalities] + [pictures.to_uint8(alone[:_SHOWN])]
    for name, given in _subsets([m.name for m in modalities]).items():
        images = sample(given, guidance, keys)
        score(name, images)
        spread(name, given, guidance)
        shown.append(pictures.to_uint8(images[:_SHOWN]))

    result |= {
        "expected": dict(wanted.get("expected", {})),
        "maps": maps,
        "guidance": guidance,
        "text_guidance": text_guidance if pipeline.base.is_text_conditional else None,
        "modulate": modulate if pipeline.base.is_text_conditional else None,
        "negative_prompt": config.sampling.negative_prompt if pipeline.base.is_text_conditional else None,
        "sampler": config.sampling.sampler,
        "steps": steps,
        "eta": config.sampling.eta,
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
    print(f"\n{maps} held-out maps, guidance {guidance:g}. Rows of {out.parent / 'samples.png'}: {rows}")
    return result
