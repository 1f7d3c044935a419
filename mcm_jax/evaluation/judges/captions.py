"""Judges of captions."""

import numpy as np

from mcm_jax.data.scenes import scene_at
from mcm_jax.evaluation.facts import facts_of, load_facts_net
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement
from mcm_jax.evaluation.judges.readers import resize_images


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
