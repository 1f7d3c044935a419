"""Whole pipelines are diffusers': from prompt and noise to picture, for each kind of base, with the MCM left out."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from mcm_jax import config as config_lib
from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("quick")

STEPS, COUNT, SEED = 10, 2, 3
PROMPTS = ["a mountain lake at sunset with three trees", "a meadow, by day"]
NEGATIVE = "night and moon"


def _pipeline(path):
    base = load_base(path)
    config = tiny.make_config(path)
    return Pipeline(base, config_lib.modulator(config, base), None, config)


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
    pipeline = _pipeline(base_path)
    found = pipeline({}, sampling.sample_keys(SEED, COUNT), guidance=0.0, steps=STEPS)
    oracle = diffusers.DDPMPipeline.from_pretrained(base_path)
    scheduler = diffusers.DDIMScheduler.from_config(oracle.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = _noise(pipeline.base)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(oracle.unet(x, t).sample, t, x).prev_sample
    np.testing.assert_allclose(found, _nhwc(x), atol=1e-4)
    _assert_same_picture(found, _nhwc(x))


def test_unconditional_latents(ldm_path):
    pipeline = _pipeline(ldm_path)
    base = pipeline.base
    found = pipeline({}, sampling.sample_keys(SEED, COUNT), guidance=0.0, steps=STEPS)
    assert found.shape == (COUNT, 32, 32, 3) == (COUNT, *base.image_shape)
    oracle = diffusers.LDMPipeline.from_pretrained(ldm_path)
    oracle.scheduler.set_timesteps(STEPS)
    x = _noise(base)
    with torch.no_grad():
        for t in oracle.scheduler.timesteps:
            x = oracle.scheduler.step(oracle.unet(x, t).sample, t, x).prev_sample
        expected = oracle.vqvae.decode(x / oracle.vqvae.config.scaling_factor).sample
    latents = _latents(pipeline, None)
    np.testing.assert_allclose(latents, _nhwc(x), atol=1e-4)
    _assert_same_picture(found, _nhwc(expected))


def _latents(pipeline, contexts):
    """The pipeline's latents, without the autoencoder: the same denoiser and sampler, put together by hand."""
    base = pipeline.base
    keys = sampling.sample_keys(SEED, COUNT)

    @jax.jit
    def run(params, contexts):
        def denoise(x, t):
            if contexts is None:
                return base.predict(params, x, t)
            positive, negative = (base.predict(params, x, t, c) for c in contexts)
            return sampling.guide(negative, positive, 7.5)

        noise = sampling.initial_noise(keys, base.latent_shape)
        return sampling.sample(denoise, noise, keys, base.schedule, steps=STEPS)

    return run(base.params, contexts)


@pytest.mark.parametrize("version", [1, 2])
def test_stable_diffusion(version, sd_path, sd2_path):
    """1.x predicts eps, 2.x v; guidance 7.5, a negative prompt."""
    path = sd_path if version == 1 else sd2_path
    pipeline = _pipeline(path)
    base = pipeline.base
    assert base.schedule.prediction_type == ("epsilon" if version == 1 else "v_prediction")
    keys = sampling.sample_keys(SEED, COUNT)
    found = pipeline(
        *({}, keys),
        **dict(prompts=PROMPTS, negative_prompt=NEGATIVE, guidance=0.0, text_guidance=7.5, steps=STEPS),
    )
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(path)
    oracle.set_progress_bar_config(disable=True)
    given = dict(num_inference_steps=STEPS, guidance_scale=7.5, negative_prompt=[NEGATIVE] * COUNT)
    size = base.image_shape[0]

    def run(kind):
        return oracle(PROMPTS, latents=_noise(base), output_type=kind, height=size, width=size, **given).images

    latents = _nhwc(run("latent"))
    contexts = base.embed_text(base.params, PROMPTS), base.embed_text(base.params, [NEGATIVE] * COUNT)
    np.testing.assert_allclose(_latents(pipeline, contexts), latents, atol=1e-4 * max(1, np.abs(latents).max()))
    _assert_same_picture(found, run("np") * 2 - 1)

    # Without guidance the negative prompt is not looked at.
    plain = pipeline({}, keys, prompts=PROMPTS, guidance=0.0, text_guidance=1.0, steps=STEPS)
    given["guidance_scale"] = 1.0
    _assert_same_picture(plain, run("np") * 2 - 1)
    assert np.abs(plain - found).max() > 0.01


def test_a_batch_that_is_filled_up_keeps_its_prompts(sd_path):
    pipeline = _pipeline(sd_path)
    keys = sampling.sample_keys(SEED, 3)
    prompts = [*PROMPTS, PROMPTS[0]]
    kwargs = dict(guidance=0.0, text_guidance=3.0, steps=2)
    together = pipeline({}, keys, prompts=prompts, batch_size=2, **kwargs)
    for i in range(3):
        alone = pipeline({}, keys[i : i + 1], prompts=[prompts[i]], batch_size=2, **kwargs)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    other = pipeline({}, keys[:1], prompts=["night"], batch_size=2, **kwargs)
    assert np.abs(other[0] - together[0]).max() > 1e-3
    assert jnp.isfinite(together).all()
