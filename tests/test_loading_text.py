"""Loading bases with an autoencoder and a text encoder: equal to diffusers, and every way to be wrong."""

import json
import shutil
import subprocess
import sys
import warnings

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from mcm_jax.base import BaseLoadError, load_base

pytestmark = pytest.mark.slow

ALPHABET = sorted(ByteLevel.alphabet())
MERGES = ["t h", "th e</w>", "o n"]
VOCAB = ["!", *(c for c in ALPHABET if c != "!"), *(f"{c}</w>" for c in ALPHABET)]
VOCAB += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
LENGTH = 9
UNET_FILE, VAE_FILE, TEXT_FILE = "unet/config.json", "vae/config.json", "text_encoder/config.json"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
# What is read of a Stable Diffusion folder whose tokenizer has the files that the Hub's folders have.
FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    *[f"{name}/config.json" for name in WEIGHTS],
    *WEIGHTS.values(),
]


def write_tokenizer(folder, pad="<|endoftext|>"):
    """The files of the Hub's Stable Diffusion folders; 2.x pads with "!", which only one of its files says."""
    folder.mkdir(parents=True, exist_ok=True)
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {name: token | {"content": text} for name, text in ends.items()}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH}
    config |= {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(ends | {"pad_token": pad}))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCAB)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


def randomise(net):
    """Also where an initialisation is constant."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net.eval()


def autoencoder(kind, **kwargs):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return randomise(kind(block_out_channels=(8, 8), norm_num_groups=4, sample_size=8, **levels, **kwargs))


def save_stable_diffusion(folder, pad="<|endoftext|>"):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(VOCAB),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(diffusers.AutoencoderKL, shift_factor=0.1),
        text_encoder=randomise(transformers.CLIPTextModel(text_config)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(write_tokenizer(folder.parent / "tokenizer", pad)),
        unet=randomise(unet),
        scheduler=diffusers.PNDMScheduler(
            20, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def save_latent_diffusion(folder):
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vqvae = autoencoder(diffusers.VQModel, latent_channels=3, num_vq_embeddings=16)
    pipeline = diffusers.LDMPipeline(vqvae, randomise(unet), diffusers.DDIMScheduler(20))
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """Folder and pipeline of a tiny Stable Diffusion; never changed."""
    folder = tmp_path_factory.mktemp("stable") / "tiny"
    return folder, save_stable_diffusion(folder)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Folder and pipeline of a tiny unconditional latent diffusion; never changed."""
    folder = tmp_path_factory.mktemp("latent") / "tiny"
    return folder, save_latent_diffusion(folder)


@pytest.fixture(scope="module")
def base(stable):
    return load_base(stable[0])


@pytest.fixture
def folder(stable, tmp_path):
    """A copy, to be damaged, with the tokenizer's files as the Hub has them."""
    copy = shutil.copytree(stable[0], tmp_path / "tiny")
    shutil.rmtree(copy / "tokenizer")
    write_tokenizer(copy / "tokenizer")
    return copy


def edit(file, **changes):
    """Changes keys of a JSON file; the value None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def expect_error(folder, *words, **kwargs):
    with pytest.raises(BaseLoadError) as error:
        load_base(folder, **kwargs)
    message = str(error.value)
    assert all(str(word) in message for word in words), message
    return message


def quick(f):
    """Compiled without LLVM's costly passes."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def to_torch(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def assert_close(found, expected):
    """Equal to 1e-5 of the scale; a picture comes as ``[B, C, H, W]``."""
    expected = expected.detach().numpy()
    expected = expected.transpose(0, 2, 3, 1) if expected.ndim == 4 else expected
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_what_a_text_conditional_base_is(base, stable):
    assert base.is_latent and base.is_text_conditional
    assert base.latent_shape == (4, 4, 4) and base.image_shape == (8, 8, 3)
    assert set(base.params) == {"unet", "vae", "text_encoder"}
    _, pipeline = stable
    for name, params in base.params.items():
        expected = sum(p.numel() for p in getattr(pipeline, name).parameters())
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected, name


def test_prediction_equals_diffusers(base, stable):
    _, pipeline = stable
    x, t, context = normal(0, 2, 4, 4, 4), np.array([3, 15], np.int32), normal(1, 2, LENGTH, 12)
    raw = pipeline.unet(to_torch(x), torch.from_numpy(t), torch.from_numpy(context)).sample
    bar = pipeline.scheduler.alphas_cumprod[torch.from_numpy(t).long()].reshape(-1, 1, 1, 1)
    found = quick(base.predict)(base.params, x, t, context)
    assert_close(found, bar.sqrt() * raw + (1 - bar).sqrt() * to_torch(x))  # eps of v


def test_latents_equal_diffusers(base, stable):
    _, pipeline = stable
    image, vae = np.tanh(normal(2, 2, 8, 8, 3)), pipeline.vae
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    posterior = vae.encode(to_torch(image)).latent_dist
    encode = quick(base.encode)
    latents = encode(base.params, image)
    assert_close(latents, (posterior.mean - shift) * scale)
    keys = jax.random.split(jax.random.key(0), 200)
    draws = np.stack([encode(base.params, image, key) for key in keys])
    np.testing.assert_array_equal(draws[0], encode(base.params, image, keys[0]))
    z = (draws - np.asarray(latents)) / (posterior.std.detach().numpy().transpose(0, 2, 3, 1) * scale)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert_close(quick(base.decode)(base.params, latents), vae.decode(to_torch(latents) / scale + shift).sample)


def embeddings(pipeline, prompts):
    """As StableDiffusionPipeline does it."""
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return ids.input_ids, pipeline.text_encoder(ids.input_ids)[0]


def test_contexts_equal_diffusers(base, stable):
    prompts = ["", "on the", "Ünï  ☃\n7!"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, context = embeddings(stable[1], prompts), base.embed_text(base.params, prompts)
    tokens = base.tokenize(prompts[:2])
    assert tokens.dtype == np.int32 and tokens.shape == (2, LENGTH)
    np.testing.assert_array_equal(tokens, ids[0][:2])
    assert_close(context, ids[1])
    assert [str(w.message) for w in caught if "prompts" in str(w.message)]  # the last is too long
    pure = quick(base.encode_tokens)(base.params, base.tokenize(prompts[:2]))
    np.testing.assert_allclose(pure, context[:2], atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(base, stable):
    with pytest.warns(UserWarning, match=r"the text encoder takes 9; cut off: 'e f g'"):
        tokens = base.tokenize(["the the a b c d x e f g"])
    expected, _ = embeddings(stable[1], ["the the a b c d x"])
    np.testing.assert_array_equal(tokens, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.tokenize(["the the a b c d x", "short"])


def test_prompts_and_contexts_that_are_none(base):
    for prompts, words in ((["a", 3], r"found 3 \(int\)"), ("a hill", r"\['a hill'\]"), ([], "at least one")):
        with pytest.raises(ValueError, match=words):
            base.embed_text(base.params, prompts)
    x, t = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="'tiny' is text-conditional"):
        base.predict(base.params, x, t)


def test_an_unconditional_latent_base_equals_diffusers(latent):
    folder, pipeline = latent
    base = load_base(folder)
    assert base.is_latent and not base.is_text_conditional
    assert base.latent_shape == (4, 4, 3) and base.image_shape == (8, 8, 3)
    assert set(base.params) == {"unet", "vqvae"}
    x, t = normal(0, 2, 4, 4, 3), np.array([3, 15], np.int32)
    assert_close(quick(base.predict)(base.params, x, t), pipeline.unet(to_torch(x), torch.from_numpy(t)).sample)
    image, scale = np.tanh(normal(1, 2, 8, 8, 3)), pipeline.vqvae.config.scaling_factor
    latents = quick(base.encode)(base.params, image)
    assert_close(latents, pipeline.vqvae.encode(to_torch(image)).latents * scale)
    assert_close(quick(base.decode)(base.params, x), pipeline.vqvae.decode(to_torch(x) / scale).sample)
    with pytest.raises(ValueError, match="'tiny' is unconditional, it has no text encoder"):
        base.tokenize(["a"])


def test_a_vqmodel_older_than_its_scale_has_none(latent, tmp_path):
    """Unlike in diffusers, whose default of today is not what such a model was trained with."""
    folder = shutil.copytree(latent[0], tmp_path / "tiny")
    edit(folder / "vqvae/config.json", scaling_factor=None)
    assert load_base(folder).autoencoder.config.scaling_factor == 1


def test_fingerprint(base, folder):
    """The same with other files of the same tokenizer and keys without effect; another where a method's values are."""
    assert load_base(folder).fingerprint == base.fingerprint
    edit(folder / TEXT_FILE, architectures=None)
    edit(folder / VAE_FILE, sample_size=512, force_upcast=False)
    assert load_base(folder).fingerprint == base.fingerprint
    changes = [
        lambda: edit(folder / VAE_FILE, scaling_factor=0.5),
        lambda: edit(folder / TEXT_FILE, hidden_act="gelu"),
        lambda: edit(folder / UNET_FILE, norm_eps=1e-3),
        lambda: write_tokenizer(folder / "tokenizer", pad="!"),
        lambda: save_file(
            {k: v + 1 if k.endswith("quant_conv.bias") else v for k, v in load_file(folder / WEIGHTS["vae"]).items()},
            folder / WEIGHTS["vae"],
        ),
    ]
    seen = {base.fingerprint}
    for change in changes:
        change()
        seen.add(load_base(folder).fingerprint)
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize("pad, number", [("<|endoftext|>", len(VOCAB) - 1), ("!", 0)])
def test_padding_is_the_tokenizers_own(pad, number, folder):
    write_tokenizer(folder / "tokenizer", pad)
    tokens = load_base(folder).tokenize(["the"])
    np.testing.assert_array_equal(tokens[0], [len(VOCAB) - 2, VOCAB.index("the</w>"), len(VOCAB) - 1, *[number] * 6])


def test_half_precision(base, folder):
    for name, file in WEIGHTS.items():
        save_file({k: v.half() for k, v in load_file(folder / file).items()}, folder / file.replace(".s", ".fp16.s"))
        (folder / file).unlink()
        assert name
    half = load_base(folder, "bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half.params))
    for name, arguments in {
        "predict": (normal(0, 1, 4, 4, 4), np.array([3]), normal(1, 1, LENGTH, 12)),
        "encode_tokens": (base.tokenize(["on the"]),),
    }.items():
        full, found = (quick(getattr(b, name))(b.params, *arguments) for b in (base, half))
        assert found.dtype == jnp.float32
        assert 0 < float(jnp.abs(full - found).max()) < 0.1 * float(jnp.abs(full).max()), name


def test_sharded_pickled_and_old_names(base, stable, tmp_path):
    pipeline = stable[1]
    for name, kwargs in {
        "shards": {"max_shard_size": "20KB"},
        "pickles": {"safe_serialization": False},
    }.items():
        pipeline.save_pretrained(tmp_path / name, **kwargs)
        assert load_base(tmp_path / name).fingerprint == base.fingerprint, name
    folder = shutil.copytree(stable[0], tmp_path / "old")
    tensors, names = load_file(folder / WEIGHTS["vae"]), {"to_q": "query", "to_k": "key", "to_v": "value"}
    for new, old in (names | {"to_out.0": "proj_attn"}).items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in tensors.items()}
    save_file(tensors, folder / WEIGHTS["vae"])
    tensors = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(folder / WEIGHTS["text_encoder"]).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(tensors, folder / WEIGHTS["text_encoder"])
    assert load_base(folder).fingerprint == base.fingerprint


def test_components_beside_the_index(tmp_path):
    """As in the oldest repositories of unconditional pixel models."""
    net = diffusers.UNet2DModel(
        4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(20)).save_pretrained(tmp_path / "new")
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    for component in ("unet", "scheduler"):
        for file in (old / component).iterdir():
            file.rename(old / file.name)
        (old / component).rmdir()
    assert load_base(old).fingerprint == load_base(tmp_path / "new").fingerprint


def damages(content):
    """A file cut in several places, or junk."""
    cuts = [0, 1, 9, len(content) // 2, len(content) - 3]
    return [*(content[:cut] for cut in cuts), np.random.default_rng(0).bytes(200), b"null", b"[]", b"{}"]


@pytest.mark.parametrize("file", FILES)
def test_fuzz_each_file_absent_damaged_or_anothers(file, folder):
    """Always our error, and it names the file, before anything is compiled."""
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    expect_error(folder, folder / file, "no such file")
    for damaged in damages(content):
        if file == TEXT_FILE and damaged == b"{}":
            continue  # transformers' defaults
        (folder / file).write_bytes(damaged)
        expect_error(folder, folder / file)
    for other in [*WEIGHTS.values(), UNET_FILE] if file in WEIGHTS.values() else FILES:
        if other != file and (folder / other).read_bytes() != content:
            (folder / file).write_bytes((folder / other).read_bytes())
            expect_error(folder, folder / file)
    (folder / file).write_bytes(content)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_fuzz_the_tokenizers_newer_files(file, stable, tmp_path):
    folder = shutil.copytree(stable[0], tmp_path / "tiny") / "tokenizer"
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    expect_error(folder.parent, folder, "no such file")
    for damaged in [*damages(content), (folder.parent / UNET_FILE).read_bytes()]:
        (folder / file).write_bytes(damaged)
        expect_error(folder.parent, folder / file)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, ["several text encoders", "1.x or 2.x"]),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, ["made from", "1.x or 2.x"]),
        ("model_index.json", {"_class_name": "LDMTextToImagePipeline"}, ["supported: DDPMPipeline"]),
        ("model_index.json", {"text_encoder": [None, None]}, ["found no text_encoder"]),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}, ["CLIPTextModel;"]),
        (UNET_FILE, {"_class_name": "UNet2DModel"}, ["'UNet2DModel'", "UNet2DConditionModel"]),
        (UNET_FILE, {"in_channels": 9}, ["found 9", VAE_FILE, "inpainting"]),
        (UNET_FILE, {"in_channels": 5}, ["found 5", VAE_FILE, "depth-to-image"]),
        (UNET_FILE, {"in_channels": 3}, ["found 3", VAE_FILE]),
        (UNET_FILE, {"out_channels": 8}, ["out_channels: found 8"]),
        (UNET_FILE, {"cross_attention_dim": 24}, ["cross_attention_dim: found 24", TEXT_FILE, "12"]),
        (UNET_FILE, {"sample_size": None}, ["sample_size: found None"]),
        (VAE_FILE, {"_class_name": "AutoencoderTiny"}, ["'AutoencoderTiny'", "AutoencoderKL, VQModel"]),
        (VAE_FILE, {"in_channels": 1}, ["supported: 3"]),
        (TEXT_FILE, {"architectures": ["CLIPModel"]}, ["architectures"]),
        (TEXT_FILE, {"model_type": "t5"}, ["model_type: found 't5'"]),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, ["'T5Tokenizer'", "CLIPTokenizer"]),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, ["found 77", "3..9", TEXT_FILE]),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["FlowMatch"]),
    ],
)
def test_unsupported_values_are_refused_before_weights_are_read(file, changes, words, folder):
    edit(folder / file, **changes)
    for weights in WEIGHTS.values():
        (folder / weights).write_bytes(b"")
    expect_error(folder, folder / file, *words)


def test_a_vocabulary_larger_than_the_text_encoders(folder):
    edit(folder / TEXT_FILE, vocab_size=len(VOCAB) - 1)
    expect_error(folder, folder / "tokenizer", folder / TEXT_FILE, len(VOCAB) - 1)


def test_tensors_that_are_extra_or_not_finite(folder):
    for name, file in WEIGHTS.items():
        tensors = load_file(folder / file)
        save_file(tensors | {"lora.weight": torch.zeros(1)}, folder / file)
        expect_error(folder, folder / file, "unexpected tensors: lora.weight")
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] * float("nan")}, folder / file)
        expect_error(folder, folder / file, "NaN")
        save_file(tensors, folder / file)
        assert name


def test_paths_that_lead_elsewhere(folder, tmp_path):
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).touch()
        expect_error(tmp_path / name, name, "single file", "from_single_file")
    lora = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir()
    lora.touch()
    expect_error(lora, "a LoRA", "fuse_lora")
    expect_error(lora.parent, lora.parent, "a LoRA")
    expect_error(folder / "unet", folder / "unet/model_index.json", "UNet2DConditionModel", "the one above")
    expect_error(tmp_path, tmp_path / "model_index.json", "no such file")
    expect_error(tmp_path / "nothing", "not a directory", "Hub")


@pytest.fixture
def hub(monkeypatch, stable, tmp_path):
    """A hub of one model, and what was asked of it."""
    asked, snapshot = [], tmp_path / "snapshots" / "abc"

    def snapshot_download(name, *, revision, allow_patterns, etag_timeout):
        from huggingface_hub.utils import filter_repo_objects

        asked.append((name, revision))
        assert etag_timeout <= 10
        files = [str(f.relative_to(hub.model)) for f in hub.model.rglob("*") if f.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub.model / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    hub = type("Hub", (), {"asked": asked, "snapshot": snapshot, "model": stable[0]})
    return hub


def test_a_base_from_the_hub(hub, base, folder):
    """Configs first, then of the weights only what is read."""
    hub.model = folder
    for extra in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5.ckpt"):
        (folder / extra).touch()
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").touch()
    (folder / VAE_FILE).parent.joinpath("diffusion_pytorch_model.safetensors").rename(
        folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    )
    found = load_base("someone/tiny-1.5")
    assert found.name == "tiny-1.5" and found.fingerprint == base.fingerprint
    assert hub.asked == [("someone/tiny-1.5", None), *[("someone/tiny-1.5", "abc")] * 2]
    weights = {str(f.relative_to(hub.snapshot)) for f in hub.snapshot.rglob("*.*") if f.suffix not in (".json", ".txt")}
    assert weights == {WEIGHTS["unet"], WEIGHTS["text_encoder"], "vae/diffusion_pytorch_model.fp16.safetensors"}


def test_a_model_of_the_hub_is_refused_before_its_weights_are_downloaded(hub, folder):
    hub.model = folder
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    expect_error("someone/xl", "model_index.json", "StableDiffusionXLPipeline")
    assert len(hub.asked) == 1


def test_a_model_of_the_hub_without_safetensors(hub, folder):
    hub.model = folder
    (folder / WEIGHTS["unet"]).rename(folder / "unet/diffusion_pytorch_model.bin")
    expect_error("someone/old", "someone/old", "no safetensors files of unet", "pass the folder")


def run(code, *arguments, **environment):
    import os

    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


LOAD = "import sys; from mcm_jax.base import load_base, BaseLoadError\ntry: load_base(sys.argv[1])\n"
LOAD += "except BaseLoadError as error: sys.exit(str(error))\n"


def test_the_hub_offline(tmp_path):
    result = run(LOAD, "someone/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "someone/nothing: not a directory, and not to be had from the Hugging Face Hub" in result.stderr
    assert "pass the path of a local folder" in result.stderr


@pytest.mark.parametrize(
    "module, path, extra", [("huggingface_hub", "someone/nothing", "hub"), ("transformers", None, "text")]
)
def test_without_an_extra(module, path, extra, stable):
    result = run(f"import sys; sys.modules[{module!r}] = None\n" + LOAD, path or stable[0])
    assert f"pip install 'mcm-jax[{extra}]'" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_prompts_need_no_pytorch(stable):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'tensorflow']))\n"
        "from mcm_jax.base import load_base; print(load_base(sys.argv[1]).tokenize(['the']).tolist())"
    )
    result = run(code, stable[0])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0][:3] == [len(VOCAB) - 2, VOCAB.index("the</w>"), len(VOCAB) - 1]
