"""Laws of streaming: batches are those of prepared examples: bit for bit, but for the rounding of nets."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mcm_jax import sharding
from mcm_jax.base import load_base
from mcm_jax.data.inputs import Streamed, prepare, prepared_bytes
from mcm_jax.training import feed, parts, step, train_and_evaluate
from mcm_jax.training.workdir import differences

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("small_path", {"train.batch_size": 4}),
        ("ldm_path", {"train.batch_size": 12}),  # more than the autoencoder sees at a time, and no multiple of that
        ("sd_path", {"train.batch_size": 4, "data.prompt_drop_rate": 0.5}),
    ],
)
def test_streamed_batches_are_the_prepared_ones(kind, changes, request):
    changes = tiny.SMALL | {"data.size": 7, "draws.count": 2, "data.views": 2, "data.flip": True} | changes
    config = tiny.make_config(request.getfixturevalue(kind), changes)
    settings, mesh = tiny.settings_of(config), sharding.make_mesh()
    base = load_base(config.base.path)
    base = dataclasses.replace(base, params=sharding.replicate(base.params, mesh))
    modalities, draws, size = settings.modalities.shown, settings.draws_for(base.card), config.train.batch_size
    source = settings.data.open("train", modalities, base.card)
    noise_step = step.make_noise_step(tiny.modulator_of(config, base), draws, seed=0, drop_rate=0.3)

    def records(inputs, steps):
        made = feed.online(base, inputs, draws, 2, {}, mesh).records(
            noise_step, batch_size=size, seed=0, steps=steps, mesh=mesh
        )
        return [jax.device_get(record) for record in made]

    prepared, streamed = prepare(base, source, modalities, mesh), Streamed(base, source, modalities, mesh)
    wanted = records(prepared, range(5))
    found = records(streamed, range(5))
    tiny.assert_same_bits(records(streamed, range(3, 5)), found[3:])  # a resumed run
    if base.is_latent:  # rounding depends on an example's place among those that the net sees at a time
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one.pop("x_t"), two.pop("x_t"), atol=2**-9)
            np.testing.assert_allclose(one.pop("eps"), two.pop("eps"), atol=2**-9)
    tiny.assert_same_bits(found, wanted)
    kept = sum(a.nbytes for name, a in prepared.source.arrays.items() if name != "prompt")
    if base.is_text_conditional:  # as if each example had a caption of its own
        kept += len(source) // 2 * prepared.contexts[0].nbytes
    assert prepared_bytes(base, source, modalities, views=2) == kept
    assert len({record["noise"].tobytes() for record in wanted}) == 5


def test_a_run_streams_what_is_large(small_path, tmp_path, monkeypatch, capsys):
    """Held-out examples, too; the run is that of prepared examples."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("image", "segmentation", "sketch"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(5):
                values = rng.integers(0, 6, (8, 8, 3) if name == "image" else (8, 8)).astype(np.uint8)
                Image.fromarray(values).save(tmp_path / "data" / split / name / f"{i}.png")
    changes = {"data.name": "folder", "data.path": str(tmp_path / "data"), "train.steps": 4, "train.validate_every": 0}
    changes |= {"train.evaluate_every": 2, "train.held_out": 4, "train.log_every": 1}
    config, states = tiny.make_config(small_path, tiny.SMALL | changes), []
    for limit in (2**32, 5 * (8 * 8 * 5) - 1):
        monkeypatch.setattr(parts, "_IN_MEMORY", limit)
        states.append(jax.device_get(train_and_evaluate(config, tmp_path / str(limit))))
        said = "5 examples would take 0.0 GiB of memory, so they are read for each batch" in capsys.readouterr().out
        assert said == (limit != 2**32)
    tiny.assert_same_bits(*states)
    assert tiny.metrics_of(tmp_path / str(2**32)) == tiny.metrics_of(tmp_path / str(limit))
    assert "held_out_loss" in tiny.metrics_of(tmp_path / str(limit))[-1]
    settings = tiny.settings_of(config)
    changed = tiny.changed(settings, {"data.stream": "on", "data.unreadable": "skip"})
    allowed, wrong = differences(settings, changed)
    assert len(allowed) == 2 and not wrong
