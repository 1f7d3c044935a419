"""Whole pipelines are diffusers': from prompt and noise to picture, for each kind of base, with the MCM left out."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import tiny
import torch

from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.pipeline import Pipeline

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

STEPS, COUNT, SEED = 10, 2, 3
PROMPTS = ["a mountain lake at sunset with three trees", "a meadow, by day"]
NEGATIVE = "night and moon"


class _Sampler:
    """A pipeline without an MCM; latents and pictures come one after the other, of one compiled sampler."""

    def __init__(self, path):
        self.base = load_base(path)
        config = tiny.make_config(path)
        raw = dataclasses.replace(self.base, autoencoder=None)  # decodes nothing: what was diffused comes out
        self._pipeline = Pipeline(raw, (), tiny.settings_of(config).sampling)

    def __call__(self, keys, **settings):
        latents = self._pipeline({}, keys, guidance=0.0, **settings)
        return latents, np.asarray(jax.jit(self.base.decode)(self.base.params, latents))


def _noise(base):
    """What the pipeline starts from, as diffusers has it."""
    noise = sampling.initial_noise(sampling.sample_keys(SEED, COUNT), base.latent_shape)
    return torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2))


def _nhwc(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def _assert_same_picture(found, expected):
    """Within one of 255 levels; both in [-1, 1]."""
    assert np.abs(np.clip(found, -1, 1) - np.clip(expected, -1, 1)).max() < 2 / 255
    assert expected.std() > 0.01


def test_unconditional_pixels(base_path):
    sampler = _Sampler(base_path)
    latents, found = sampler(sampling.sample_keys(SEED, COUNT), steps=STEPS, batch_size=COUNT)
    oracle = diffusers.DDPMPipeline.from_pretrained(base_path)
    scheduler = diffusers.DDIMScheduler.from_config(oracle.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = _noise(sampler.base)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(oracle.unet(x, t).sample, t, x).prev_sample
    np.testing.assert_allclose(latents, _nhwc(x), atol=1e-4)
    _assert_same_picture(found, _nhwc(x))


def test_unconditional_latents(ldm_path):
    sampler = _Sampler(ldm_path)
    latents, found = sampler(sampling.sample_keys(SEED, COUNT), steps=STEPS, batch_size=COUNT)
    assert found.shape == (COUNT, 32, 32, 3) == (COUNT, *sampler.base.image_shape)
    oracle = diffusers.LDMPipeline.from_pretrained(ldm_path)
    oracle.scheduler.set_timesteps(STEPS)
    x = _noise(sampler.base)
    with torch.no_grad():
        for t in oracle.scheduler.timesteps:
            x = oracle.scheduler.step(oracle.unet(x, t).sample, t, x).prev_sample
        expected = oracle.vqvae.decode(x / oracle.vqvae.config.scaling_factor).sample
    np.testing.assert_allclose(latents, _nhwc(x), atol=1e-4)
    _assert_same_picture(found, _nhwc(expected))


@pytest.mark.parametrize("version", [1, 2])
def test_stable_diffusion(version, sd_path, sd2_path):
    """1.x predicts eps, 2.x v; guidance 7.5, a negative prompt."""
    path = sd_path if version == 1 else sd2_path
    sampler = _Sampler(path)
    base = sampler.base
    assert base.schedule.prediction_type == ("epsilon" if version == 1 else "v_prediction")
    keys = sampling.sample_keys(SEED, COUNT)
    settings = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "steps": STEPS, "batch_size": COUNT}
    latents, found = sampler(keys, text_guidance=7.5, **settings)
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "negative_prompt": [NEGATIVE] * COUNT}
    size = base.image_shape[0]

    def run(kind):
        return oracle(PROMPTS, latents=_noise(base), output_type=kind, height=size, width=size, **given).images

    expected = _nhwc(run("latent"))
    np.testing.assert_allclose(latents, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    _assert_same_picture(found, run("np") * 2 - 1)
    if version == 1:  # without guidance the negative prompt is not looked at
        plain = sampler(keys, text_guidance=1.0, **settings)[1]
        given["guidance_scale"] = 1.0
        _assert_same_picture(plain, run("np") * 2 - 1)
        assert np.abs(plain - found).max() > 0.01


def test_a_batch_that_is_filled_up_keeps_its_prompts(sd_path):
    sampler = _Sampler(sd_path)
    keys = sampling.sample_keys(SEED, 3)
    prompts = [*PROMPTS, PROMPTS[0]]
    settings = {"text_guidance": 3.0, "steps": 2, "batch_size": 2}
    together, _ = sampler(keys, prompts=prompts, **settings)
    for i in range(3):
        alone, _ = sampler(keys[i : i + 1], prompts=[prompts[i]], **settings)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    other, _ = sampler(keys[:1], prompts=["night"], **settings)
    assert np.abs(other[0] - together[0]).max() > 1e-3
