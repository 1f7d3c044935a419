"""What both nets that judge samples refuse: pictures that they were not trained on, folders that do not fit."""

import json
import shutil

import numpy as np
import pytest

from mcm_jax.evaluation import facts, segmenter

LOADERS = {"segmenter": (segmenter.load_segmenter, segmenter.ASSET), "facts": (facts.load_facts_net, facts.ASSET)}


@pytest.mark.parametrize("name", LOADERS)
def test_wrong_pictures_are_refused(name):
    net = LOADERS[name][0]()
    images = np.zeros((2, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match=r"trained on images \[B, 32, 32, 3\], got \[2, 16, 32, 3\]"):
        net.predict(images[:, :16])
    with pytest.raises(ValueError, match="trained on"):
        net.predict(images[0])
    with pytest.raises(ValueError, match="floats"):
        net.predict(np.zeros((1, 32, 32, 3), np.uint8))
    for wrong in (images + 2, images * np.nan):
        with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
            net.predict(wrong)


@pytest.mark.parametrize("name", LOADERS)
def test_broken_folders_are_refused(name, tmp_path):
    load, asset = LOADERS[name]
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(tmp_path)
    shutil.copytree(asset, tmp_path / "wider")
    config = json.loads((asset / "config.json").read_text())
    config["net"]["widths"][0] *= 2
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing .* unexpected "):
        load(tmp_path / "wider")
    for content in ("[]", "{}", '{"net": 3}', json.dumps(config | {"height": 30.5})):
        (tmp_path / "wider" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json describes no net"):
            load(tmp_path / "wider")
    shutil.copy(asset / "config.json", tmp_path / "wider")
    (tmp_path / "wider" / "model.safetensors").write_bytes((asset / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "wider")


def test_a_segmenter_names_its_classes(tmp_path):
    folder = shutil.copytree(segmenter.ASSET, tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    for classes in (None, 6, config["classes"][:5]):
        (folder / "config.json").write_text(json.dumps(config | {"classes": classes}))
        with pytest.raises(ValueError, match="expected the names of 6"):
            segmenter.load_segmenter(folder)
