"""An MCM on a text-conditional latent base: what training sees, and the scripts with prompts."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import CLIPTokenizer

from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.data import inputs
from mcm_jax.data.pipeline import InMemory, training_batches
from mcm_jax.data.scenes import Scenes
from mcm_jax.draws import Draws
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.jobs import Drawer, jobs_of_folder, lists, read_jobs, read_record, replay
from mcm_jax.pictures import to_uint8
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh, replicate
from mcm_jax.training import feed, precompute, step, train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

COUNT = 6
PROMPT = "a mountain lake at sunset with three trees"


@pytest.fixture(scope="module")
def base(sd_path):
    return load_base(sd_path)


@pytest.fixture(scope="module")
def config(sd_path):
    return tiny.make_config(sd_path, {"train.validate_every": 0, "train.steps": 3, "data.size": COUNT})


@pytest.fixture(scope="module")
def modulator(config, base):
    return tiny.modulator_of(config, base)


@pytest.fixture(scope="module")
def source():
    return InMemory.render(Scenes("train", COUNT, 32, 32, 2))


@pytest.fixture(scope="module")
def prepared(base, modulator, source):
    mesh = make_mesh()
    replicated = dataclasses.replace(base, params=replicate(base.params, mesh))
    return inputs.prepare(replicated, source, modulator.modalities, mesh)  # 6 examples: a batch that is filled up


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sd"
    train_and_evaluate(config, folder)
    return folder


def test_inputs_are_what_the_base_makes_of_the_examples(base, modulator, source, prepared):
    arrays = prepared.source.arrays
    images = source.arrays["image"].astype(np.float32) / 127.5 - 1
    latents = np.asarray(base.encode(base.params, jnp.asarray(images)))
    assert arrays["latent"].dtype == np.float16
    np.testing.assert_allclose(arrays["latent"], latents, rtol=2**-10, atol=1e-5)  # rounded
    assert arrays["latent"].shape == (COUNT, *base.latent_shape)
    for modality in modulator.modalities:
        of_one = [modality.resize(source.arrays[modality.name][i], 16, 16) for i in range(COUNT)]
        if modality.kind == "labels":
            np.testing.assert_array_equal(arrays[modality.name], of_one)
        assert arrays[modality.name].shape == (COUNT, 16, 16) and arrays[modality.name].dtype == np.uint8
    captions = [str(c) for c in source.arrays["caption"]]
    np.testing.assert_allclose(prepared.contexts[arrays["prompt"]], base.embed_text(base.params, captions), atol=1e-5)
    np.testing.assert_allclose(prepared.contexts[:1], base.embed_text(base.params, [""]), atol=1e-5)
    assert len(prepared.contexts) == 1 + len(set(captions))


def test_resized_maps_keep_their_values(modulator):
    """Eight bits and floats are brought to the grid alike."""
    (sketch,) = (m for m in modulator.modalities if m.kind == "lines")
    values = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)
    small = sketch.resize_all(values, 16, 16)
    of_floats = sketch.resize_all(values.astype(np.float32) / 255, 16, 16)
    np.testing.assert_allclose(small / 255.0, of_floats, atol=0.5 / 255 + 1e-6)
    assert sketch.resize_all(values, 32, 32) is values


def test_predictions_see_the_prompt(base, modulator, prepared):
    """Each example's own, or the empty one as its draw says, and the same whenever that draw comes again."""
    mesh = make_mesh()
    replicated = dataclasses.replace(base, params=replicate(base.params, mesh))
    draws = Draws(seed=0, count=4, density=(1,), total=base.schedule.num_train_timesteps, prompt_drop_rate=0.5)
    noise_step = step.make_noise_step(modulator, draws, seed=0, drop_rate=0.3)
    source = feed.online(replicated, prepared, draws, 1, {}, mesh)
    seen = []
    for i, record in enumerate(source.records(noise_step, batch_size=COUNT, seed=0, steps=range(4), mesh=mesh)):
        batch = training_batches(source.read, COUNT, COUNT, 0)[i]
        dropped = np.asarray(draws.prompt_is_dropped(batch["index"], batch["draw"]))
        seen.append(dropped.mean())
        for rows, same in ((np.where(dropped, 0, batch["prompt"]), True), (batch["prompt"], not dropped.any())):
            expected = base.predict(
                base.params, np.asarray(record["x_t"]), np.asarray(record["t"]), prepared.contexts[rows]
            )
            assert (np.abs(np.asarray(record["eps"]) - expected).max() < 1e-5) == same
    assert 0.2 < np.mean(seen) < 0.8


@pytest.mark.parametrize("where", ["after_cfg", "before_cfg", "prompt_only"])
def test_guidance_of_the_prompt_goes_through_base_and_mcm(where, workdir, source):
    """One step of the pipeline against the formula put together by hand."""
    pipeline = Pipeline.from_folder(workdir)
    rng = np.random.default_rng(0)
    (mcm,), base = pipeline.mcms, pipeline.base
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), mcm.params)
    modulator = mcm.modulator
    latents = dataclasses.replace(base, autoencoder=None)  # no decoding: what was diffused comes out
    pipeline = Pipeline(latents, mcm._replace(params=params), pipeline.settings)
    keys = jax.random.split(jax.random.key(3), 2)
    conditions = {m.name: m.resize_all(source.arrays[m.name][:2], 16, 16) for m in modulator.modalities}
    conditions["sketch"] = conditions["sketch"].astype(np.float32) / 255
    scales = {"guidance": 1.5, "text_guidance": 4.0, "modulate": where}
    found = pipeline(
        conditions, keys, prompts=[PROMPT, "night"], negative_prompt="day", steps=1, batch_size=2, **scales
    )

    x = sampling.initial_noise(keys, base.latent_shape)
    t = jnp.full(2, base.schedule.timesteps(1)[0], jnp.int32)
    p, n = (
        base.predict(base.params, x, t, base.embed_text(base.params, prompts))
        for prompts in ([PROMPT, "night"], ["day", "day"])
    )
    present = np.ones((2, 2), bool)
    mcm = lambda eps: modulator(params, x, eps, t, conditions, present)[0]  # noqa: E731
    if where == "after_cfg":
        eps = n + 4.0 * (p - n)
        eps = eps + 1.5 * (mcm(eps) - eps)
    else:
        n, p = n if where == "prompt_only" else n + 1.5 * (mcm(n) - n), p + 1.5 * (mcm(p) - p)
        eps = n + 4.0 * (p - n)
    expected = sampling.sample(lambda *_: eps, x, keys, pipeline.settings.but(steps=1).table(base.schedule))
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(np.abs(expected).max()))


def test_sample_script_with_a_prompt(script, workdir, tmp_path):
    segmentation = tmp_path / "segmentation.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 6, (40, 24)).astype(np.uint8)).save(segmentation)
    outcome = script(
        *("sample.py", f"--workdir={workdir}", f"--segmentation={segmentation}", f"--prompt={PROMPT}"),
        *("--negative_prompt=night", "--text_guidance=3", "--num_samples=2", f"--out={tmp_path / 'out'}"),
    )
    assert outcome.status == 0, outcome.err
    said = json.loads((tmp_path / "out/samples.json").read_text())
    assert (said["prompt"], said["negative_prompt"], said["text_guidance"]) == (PROMPT, "night", 3.0)
    assert np.asarray(Image.open(tmp_path / "out/sample_000.png")).shape == (32, 32, 3)
    settings = {"num_samples": 2, "prompt": PROMPT, "negative_prompt": "night", "text_guidance": 3.0}
    same = generate(str(workdir), {"segmentation": str(segmentation)}, tmp_path / "same", **settings)
    other = generate(
        str(workdir),
        {"segmentation": str(segmentation)},
        tmp_path / "other",
        **settings | {"prompt": "a meadow by day"},
    )
    assert (tmp_path / "same/sample_001.png").read_bytes() == (tmp_path / "out/sample_001.png").read_bytes()
    assert np.any(same != other)


def test_jobs_have_their_own_prompts_and_few_programs(workdir, tmp_path, monkeypatch):
    """One with text guidance, whatever its scale and negative prompt, one without, and one a place of the MCM."""
    drawer = Drawer(str(workdir), steps=2, batch_size=2)
    how = ({"text_guidance": 3}, {"negative_prompt": "night"}, {"text_guidance": 1}, {"prompt": "a meadow by day"})
    how += ({"negative_prompt": "night", "modulate": "prompt_only"},)
    lines = [{"name": str(i), "seed": 1, "prompt": PROMPT, **more} for i, more in enumerate(how)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs, problems = read_jobs(tmp_path / "jobs.jsonl", drawer)
    assert not problems and drawer.draw(jobs, tmp_path) == 5
    programs = {(False, "before_cfg"), (True, "before_cfg"), (True, "prompt_only")}
    assert {*drawer.pipeline.engine.programs} == programs and drawer.pipeline.engine.compilations == 3
    found = [np.asarray(Image.open(tmp_path / f"{job.name}.png")).astype(int) for job in jobs]
    for job, line, picture in zip(jobs, lines, found, strict=True):
        own = {k: line[k] for k in ("text_guidance", "negative_prompt", "modulate") if k in line}
        alone = drawer.pipeline({}, sampling.sample_keys(1, 1), prompts=[job.prompt], steps=2, batch_size=2, **own)
        assert np.abs(to_uint8(alone[0]).astype(int) - picture).max() <= 1
    # The last one differs in where the MCM stands alone, which three steps of training hardly tell.
    assert all((a != b).any() for i, a in enumerate(found[:4]) for b in found[:i])
    monkeypatch.setattr(lists, "Drawer", lambda *_, **__: drawer)
    for name in ("1", "4"):
        replay(tmp_path / f"{name}.png", tmp_path / "again")
        said, again = (read_record(folder / f"{name}.png") for folder in (tmp_path, tmp_path / "again"))
        assert said == again and (said["prompt"], said["negative_prompt"]) == (PROMPT, "night")
        picture = np.asarray(Image.open(tmp_path / f"again/{name}.png")).astype(int)
        assert np.abs(picture - found[int(name)]).max() <= 1
    assert said["modulate"] == "prompt_only"
    replay(tmp_path / "1.png", tmp_path / "other", prompt="a meadow by day", negative_prompt="")
    other = np.asarray(Image.open(tmp_path / "other/1.png")).astype(int)
    assert np.abs(other - found[3]).max() <= 1
    with pytest.raises(UserError, match="negative_prompt: does nothing at text_guidance=1"):
        replay(tmp_path / "2.png", tmp_path / "again", negative_prompt="night")

    odd = ({"text_guidance": 1, "negative_prompt": "night"}, {"text_guidance": 1, "modulate": "after_cfg"})
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, odd)))
    _, problems = read_jobs(tmp_path / "odd.jsonl", drawer)
    for words, problem in zip(("negative_prompt", "modulate"), problems, strict=True):
        assert f"{words}: does nothing at text_guidance=1" in problem
    (tmp_path / "odd.jsonl").write_text('{"text_guidance": 1}')
    with pytest.raises(UserError, match="text_rescale: does nothing at text_guidance=1"):
        read_jobs(tmp_path / "odd.jsonl", drawer, text_rescale=0.7)
    assert not read_jobs(tmp_path / "jobs.jsonl", drawer, text_rescale=0.7)[1]  # most lines have guidance


def test_a_bad_caption_of_a_folder_is_named(workdir, tmp_path):
    for folder in ("sketch", "caption"):
        (tmp_path / folder).mkdir()
    for name, text in (("a", PROMPT), ("b", "a lake\nby day")):
        Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / f"sketch/{name}.png")
        (tmp_path / f"caption/{name}.txt").write_text(text)
    jobs, (problem,) = jobs_of_folder(tmp_path, Drawer(str(workdir)))
    assert [(job.name, job.prompt) for job in jobs] == [("a", PROMPT)]
    assert "b.txt: expected one line, the prompt, found 2" in problem


def test_a_prompt_that_is_too_long_says_what_is_cut(workdir, tmp_path):
    pipeline = Pipeline.from_folder(workdir)
    keys = jax.random.split(jax.random.key(0), 1)
    long = " ".join(["three trees and"] * 9)
    with pytest.warns(UserWarning, match="trees and"):
        pipeline({}, keys, prompts=[long], steps=1, batch_size=1)


@pytest.fixture
def short_path(sd_path, tmp_path):
    """The base, which here takes prompts of 12 tokens: too few for most captions of scenes."""
    folder = shutil.copytree(sd_path, tmp_path / "sd")
    file = folder / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 12}))
    return folder


def prompts_warned_of(run):
    """What a function warns of prompts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "prompts:" in str(w.message)]


def test_a_data_set_has_one_warning_of_prompts_that_are_too_long(short_path, config, modulator, tmp_path):
    """At the end, whether they are embedded at once or shard by shard; captions count as often as they come."""
    base, mesh, count = load_base(short_path), make_mesh(), 40
    changed = tiny.make_config(short_path, {"data.size": count, "draws.count": 2, "cache.shard_draws": 8})
    source = InMemory.render(Scenes("train", count, 32, 32, changed.data.seed))
    captions = list(map(str, source.arrays["caption"]))
    tokens = list(map(len, CLIPTokenizer.from_pretrained(short_path / "tokenizer")(captions)["input_ids"]))
    long = [caption for caption, number in zip(captions, tokens, strict=True) if number > 12]
    assert 8 < len(set(long)) < len(long) < count  # more than a call of the text encoder takes, and some twice
    first = f"'{long[0]}' has {tokens[captions.index(long[0])]} tokens, the text encoder takes 12; cut off: '"
    expected = f"prompts: {len(long)} of {count} are too long and were cut. The first: {first}"

    replicated = dataclasses.replace(base, params=replicate(base.params, mesh))
    said = prompts_warned_of(lambda: inputs.prepare(replicated, source, modulator.modalities, mesh))
    assert len(said) == 1 and said[0].startswith(expected), said
    said = prompts_warned_of(lambda: precompute(changed, tmp_path / "run"))
    assert len(said) == 1 and said[0].startswith(expected), said


def test_samples_have_one_warning_of_prompts_that_are_too_long(workdir):
    pipeline = Pipeline.from_folder(workdir)
    long = [" ".join([f"{word} trees and"] * 9) for word in ("two", "three")]

    def sample(prompts, **kwargs):
        keys = jax.random.split(jax.random.key(0), len(prompts))
        return prompts_warned_of(lambda: pipeline({}, keys, prompts=prompts, steps=1, batch_size=4, **kwargs))

    (of_one,) = sample(long[:1] * 4, text_guidance=2.0)
    assert of_one.startswith(
        f"prompts: '{long[0]}' has 29 tokens, the text encoder takes 20; cut off: 'two trees and two"
    )
    (of_several,) = sample(["night", *long, long[0]])
    assert of_several.startswith(f"prompts: 2 of 3 are too long and were cut. The first: '{long[0]}' has 29 tokens")
    assert sample(["night", "day"]) == []


@pytest.mark.parametrize(
    "prompts, words",
    [
        (["one"], ["prompts", "expected 2", "got 1"]),
        (["one", 2], ["prompts", "texts", "2", "int"]),
    ],
)
def test_odd_prompts_are_refused(prompts, words, workdir):
    pipeline = Pipeline.from_folder(workdir)
    with pytest.raises(UserError) as error:
        pipeline({}, jax.random.split(jax.random.key(0), 2), prompts=prompts)
    assert all(word in str(error.value) for word in words), error.value


def test_an_unconditional_base_takes_no_prompt(script, trained, tmp_path):
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "sketch.png")
    arguments = [f"--workdir={trained.workdir}", f"--sketch={tmp_path / 'sketch.png'}", f"--out={tmp_path / 'out'}"]
    assert script("sample.py", *arguments, "--prompt=a lake").explains("--prompt", "'tiny'", "unconditional")
    assert not (tmp_path / "out").exists()
