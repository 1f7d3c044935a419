"""The judge by a CLIP's folder gives what transformers' CLIP gives for the same pictures and captions."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from mcm_jax.base import BaseCard
from mcm_jax.data import DataSettings
from mcm_jax.data.scenes import Scenes
from mcm_jax.errors import UserError
from mcm_jax.evaluation.clip import ImageProcessor, load_clip
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.pictures import to_uint8

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

COUNT = 5
LEFT_OUT = {"segmentation": "none", "sketch": "none"}
CARD = BaseCard("none", "", None, (32, 32, 3), (32, 32, 3), True, 0, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and transformers' CLIP that it was written from."""
    folder = tmp_path_factory.mktemp("clips") / "clip"
    return folder, tiny.save_clip(folder, length=10)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def held_out():
    return HeldOut(DataSettings(), CARD, (), COUNT)


def test_scores_are_those_of_transformers(saved, held_out):
    """With pictures of negative cosines among them, and captions that are longer than the text tower."""
    folder, net = saved
    with pytest.warns(UserWarning, match=f"of {COUNT} are too long and were cut. The first: '.* takes 10; cut") as told:
        (judge,) = judges_of(held_out, LEFT_OUT | {"caption": f"clip:{folder}"})
    assert len(told) == 1
    which = np.array([3, 0, 1, 4, 2, 2, 0])  # more than there are examples: more than a batch
    images = np.random.default_rng(0).uniform(-1, 1, (len(which), 32, 24, 3)).astype(np.float32)
    images[::2] = held_out.images[which[::2], :, :24]
    judgement = judge(images, which)

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    texts = tokenizer([held_out.captions[i] for i in which], padding=True, truncation=True, return_tensors="pt")
    pixels = processor([Image.fromarray(image) for image in to_uint8(images)], return_tensors="pt")
    with torch.no_grad():
        found = net(**texts, **pixels)
    cosines = (found.image_embeds * found.text_embeds).sum(-1).numpy()
    assert cosines.min() < 0 < cosines.max()
    np.testing.assert_allclose(judgement.scores, cosines, atol=1e-5)
    assert judgement.numbers == {"clip_score": pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-3)}
    assert judge.watch(images, which) == judgement.numbers


SIZES = [(13, 13), (32, 24), (24, 33), (9, 7), (100, 37)]


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 30, "crop_size": {"height": 17, "width": 17}, "resample": 2, "image_mean": [0.5, 0.4, 0.3]}],
)
def test_pictures_are_prepared_as_by_transformers(options, tmp_path):
    """To the bit, whichever side is the shorter one."""
    theirs = transformers.CLIPImageProcessorPil(**{"size": {"shortest_edge": 13}, "crop_size": 13} | options)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_dict(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    for height, width in SIZES:
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        wanted = np.stack(theirs([*images], return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(ours(images), wanted, err_msg=f"{height}x{width}")
    defaults = json.loads(transformers.CLIPImageProcessorPil().to_json_string())
    on_the_hub = {"size": 224, "crop_size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert ImageProcessor.from_dict(defaults) == ImageProcessor.from_dict(on_the_hub) == ImageProcessor()


def test_a_whole_processors_file_is_read(saved, folder):
    """As transformers 5 writes it."""
    (folder / "preprocessor_config.json").unlink()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(saved[0])
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    assert (folder / "processor_config.json").is_file()
    assert load_clip(folder).processor == load_clip(saved[0]).processor


def test_a_folders_captions_are_read_for_any_base(saved, tmp_path):
    data = DataSettings(name="folder", path=str(tmp_path))
    for name in ("image", "caption"):
        (tmp_path / "test" / name).mkdir(parents=True)
    for i, scene in enumerate(Scenes("test", 2)):
        Image.fromarray(to_uint8(scene["image"])).save(tmp_path / f"test/image/{i}.png")
        (tmp_path / f"test/caption/{i}.txt").write_text(f"lake {i}")
    held_out = HeldOut(data, dataclasses.replace(CARD, is_text_conditional=False), (), 2)
    assert held_out.captions == ["lake 0", "lake 1"]
    shutil.rmtree(tmp_path / "test/caption")
    held_out = dataclasses.replace(held_out)
    assert judges_of(held_out, {}) == []
    with pytest.raises(UserError, match=r"caption=clip:\S+: the data set has no captions to judge by. \S+caption: "):
        judges_of(held_out, {"caption": f"clip:{saved[0]}"})


def test_which_judge_a_caption_has(held_out):
    by_name = lambda spec, of=held_out: [j.headline for j in judges_of(of, LEFT_OUT | {"caption": spec})]  # noqa: E731
    untold = HeldOut(DataSettings(), dataclasses.replace(CARD, is_text_conditional=False), (), COUNT)
    assert by_name("") == by_name("facts") == by_name("facts", untold) == [("facts.mean",)]
    assert by_name("none") == by_name("", untold) == []
    with pytest.raises(UserError, match=r"caption=bleu: no such judge .*expected clip:FOLDER .*facts, or none"):
        by_name("bleu")
    with pytest.raises(UserError, match="caption=facts: no such judge of captions here"):
        judges_of(HeldOut(DataSettings("emoji"), CARD, (), 2), LEFT_OUT | {"caption": "facts"})


def drop(name):
    return lambda folder: (folder / name).unlink()


def change(name, key, value):
    def write(folder):
        content = json.loads((folder / name).read_text())
        inner = content
        *parents, last = key.split(".")
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        (folder / name).write_text(json.dumps(content))

    return write


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"], tensors["logit_scale"]  # nobody misses the second one
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"copy: no such folder; a CLIP's folder holds config.json, .*save_pretrained"),
        (drop("config.json"), r"config\.json: no such file; a CLIP's folder holds"),
        (drop("model.safetensors"), r"model\.safetensors: no such file"),
        (drop("preprocessor_config.json"), r"preprocessor_config\.json: no such file; a CLIP's folder"),
        (drop("tokenizer_config.json"), r"tokenizer_config\.json: no such file"),
        (pickle_only, r"pytorch_model\.bin: a pickle, which can run any code .*CLIPModel\.from_pretrained"),
        (without_a_tensor, r"model\.safetensors: .*missing tensors: visual_projection\.weight$"),
        (change("config.json", "model_type", "siglip"), r"config\.json: model_type: found 'siglip', supported: clip"),
        (
            change("config.json", "text_config.eos_token_id", 49407),
            r"eos_token_id: found 49407, .*ends texts with token",
        ),
        (change("config.json", "vision_config.image_size", 14), r"crop_size: found 13, expected image_size of .*, 14"),
        (change("preprocessor_config.json", "do_resize", False), r"do_resize: found False, supported: true"),
        (change("preprocessor_config.json", "size", {"height": 13, "width": 13}), r'size: found .*"shortest_edge"'),
        (change("preprocessor_config.json", "crop_size", 14), r"crop_size: found 14, supported: 1\.\.13"),
        (change("preprocessor_config.json", "resample", 9), r"resample: found 9"),
    ],
)
def test_bad_folders_are_refused(spoil, message, folder):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_clip(folder)
