"""Judges of captions: the facts of scenes, and the CLIP score of anything."""

import numpy as np

from mcm_jax.base.tokenizer import Cuts
from mcm_jax.data.scenes import scene_at
from mcm_jax.errors import UserError
from mcm_jax.evaluation.clip import load_clip
from mcm_jax.evaluation.facts import facts_of, load_facts_net
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement
from mcm_jax.evaluation.judges.readers import resize_images

CAN_BE = "clip:FOLDER (CLIP score, by a CLIP that transformers wrote), or for scenes facts"

_BATCH = 64  # pictures that CLIP sees at once


def captions(spec: str, held_out: HeldOut) -> list[Judge]:
    """The judge that a text describes, or none: '' is `facts` for scenes and a base that is told the caption.

    Raises:
      UserError: there is no such judge, or the data set has no captions.
    """
    is_scenes = held_out.data.name == "scenes"
    spec = spec or ("facts" if is_scenes and held_out.card.is_text_conditional else "none")
    kind, _, folder = spec.partition(":")
    if kind == "clip" and folder:
        return [clip_score(folder, held_out)]
    if spec == "facts" and is_scenes:
        return [facts(held_out)]
    if spec == "none":
        return []
    raise UserError(f"--judge=caption={spec}: no such judge of captions here; expected {CAN_BE}, or none")


def clip_score(folder: str, held_out: HeldOut) -> Judge:
    """CLIP score (Hessel et al. 2021, with w = 100 for its 2.5): how well pictures belong to their captions.

    It is torchmetrics' ``CLIPScore`` but for negative cosines, which are 0 here picture by picture, as in the paper;
    there the mean alone is held above 0. A picture's score is the cosine itself.

    Args:
      folder: of the CLIP, see :func:`mcm_jax.evaluation.clip.load_clip`.
      held_out: examples with captions.

    Raises:
      UserError: no CLIP, or no captions.
    """
    try:
        texts = held_out.captions
    except UserError as e:
        raise UserError(f"--judge=caption=clip:{folder}: the data set has no captions to judge by. {e}") from e
    model, cuts = load_clip(folder), Cuts()
    wanted = model.embed_texts(texts, cuts)
    cuts.warn(stacklevel=2)
    batch = min(_BATCH, len(held_out))

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        cosines = (model.embed_images(images, batch) * wanted[which]).sum(axis=-1)
        return Judgement({"clip_score": float(100 * np.maximum(cosines, 0).mean())}, cosines)

    how = f"CLIP score: mean of 100 * max(cosine, 0) of picture and caption, by the CLIP {folder}"
    return Judge("caption", how, judge, ("clip_score",), ("clip_score",))


def facts(held_out: HeldOut) -> Judge:
    """Whether scenes show what their captions say."""
    net = load_facts_net()
    size = net.config["height"], net.config["width"]
    told = facts_of([scene_at(held_out.data.seed, "test", i).facts for i in range(len(held_out))])

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        seen = net.predict(resize_images(images, *size))
        right = {fact: seen[fact] == told[fact][which] for fact in told}
        shares = {fact: float(holds.mean()) for fact, holds in right.items()}
        numbers = shares | {"mean": sum(shares.values()) / len(shares)}
        return Judgement({"facts": numbers}, np.mean(list(right.values()), axis=0))

    return Judge("caption", "share of the caption's facts, read by a net", judge, ("facts.mean",), ("facts",))
