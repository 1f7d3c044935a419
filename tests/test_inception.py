"""FID's Inception-v3: the numbers of pytorch-fid's own net, the judge that it makes, and files that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import save_file

from mcm_jax.base import BaseSettings
from mcm_jax.data import DataSettings
from mcm_jax.errors import UserError
from mcm_jax.evaluation.evaluate import EvaluationSettings
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.inception import InceptionV3, inception_features, load_inception, resize
from mcm_jax.evaluation.judges import judges_of

# Of each 128 features in a row, what pytorch-fid 0.3.0's InceptionV3([3]) gave in float64 (torchvision 0.28.0, torch
# 2.13.0) with the weights and for the pictures below: mean and maximum, of either picture.
MEANS = (
    (
        3.208337,
        2.688014,
        2.681054,
        2.759709,
        2.844143,
        2.74923,
        2.467672,
        2.765098,
        2.990096,
        3.356271,
        3.076632,
        3.198318,
        2.973646,
        2.909652,
        4.012597,
        3.399163,
    ),
    (
        3.281065,
        2.792422,
        2.736926,
        2.774651,
        2.908061,
        2.829651,
        2.486853,
        2.863459,
        3.035039,
        3.445001,
        3.186116,
        3.29169,
        3.043696,
        2.985726,
        4.132961,
        3.475243,
    ),
)
MAXIMA = (
    (
        20.417625,
        17.62767,
        13.523293,
        15.683295,
        17.537728,
        21.354144,
        19.137812,
        18.737916,
        17.305245,
        22.085024,
        22.098443,
        14.625582,
        15.002607,
        23.665331,
        20.183658,
        28.108748,
    ),
    (
        21.256005,
        18.100411,
        13.916212,
        15.857815,
        17.833244,
        21.957013,
        19.842111,
        19.768909,
        17.89722,
        22.507895,
        23.378736,
        15.096372,
        15.714424,
        24.64995,
        19.378247,
        28.32819,
    ),
)


def uniform(rng, name, shape):
    """Of a scale that keeps activations from dying and from growing."""
    low, high = {
        "conv.weight": (-1, 1),
        "bn.weight": (0.7, 1.3),
        "bn.bias": (-0.3, 0.5),
        "bn.running_mean": (-0.3, 0.3),
        "bn.running_var": (0.5, 1.5),
    }[".".join(name.split(".")[-2:])]
    scale = np.sqrt(6 / np.prod(shape[1:])) if len(shape) == 4 else 1
    return (rng.uniform(low, high, shape) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def tensors():
    """Weights with the names and shapes of pytorch-fid's state dict. RandomState: its numbers never change."""
    rng, image = np.random.RandomState(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep=".").items()}
    made = {name: uniform(rng, name, shapes[name]) for name in sorted(shapes)}
    made |= {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    return made | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, path)
    return path


def test_features_are_those_of_pytorch_fid(file):
    pictures = np.random.RandomState(1).randint(0, 256, (2, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    found = inception_features(file)(pictures.astype(np.float32) / 127.5 - 1)
    groups = found.reshape(2, 16, 128)
    assert found.shape == (2, 2048) and found.dtype == np.float32
    np.testing.assert_allclose(groups.mean(-1), MEANS, rtol=0, atol=1e-5 * np.max(MEANS))
    np.testing.assert_allclose(groups.max(-1), MAXIMA, rtol=0, atol=1e-5 * np.max(MAXIMA))


@pytest.mark.parametrize("size", [(40, 56), (350, 299), (700, 61)])
def test_pictures_are_resized_as_pytorch_does_it(size):
    images = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(images.transpose(0, 3, 1, 2)), (299, 299), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize(jnp.array(images)), wanted.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def mean_colours(images):
    """Features of a user's own."""
    return images.mean((1, 2))


def _one(images):
    return mean_colours(images)[:1]


def _nan(images):
    return mean_colours(images) * np.nan


@pytest.fixture(scope="module")
def held_out():
    """Two scenes of a data set whose labels nobody judges."""
    return HeldOut(DataSettings(), BaseSettings().outline().card, (), 2)


def judge_of(held_out, spec):
    specs = {"segmentation": "none", "sketch": "none", "fidelity": spec}
    return judges_of(held_out, specs, references=2)


def test_sets_are_judged_by_the_features_that_are_asked_for(held_out, file):
    assert judge_of(held_out, "") == judge_of(held_out, "none") == []
    (judge,) = judge_of(held_out, f"inception:{file}")
    numbers = judge(held_out.images, np.arange(2)).numbers
    assert "FID's Inception-v3" in judge.how and "2,049 pictures" in judge.how and "bilinear" in judge.how
    assert "needs at least 2049 pictures" in numbers["fid"] and np.isfinite(numbers["kid"]) and numbers["nearest"] > 0
    (judge,) = judge_of(held_out, "test_inception:mean_colours")
    colours = judge(next(held_out.training_images(2)), np.arange(2)).numbers
    assert colours["kid"] == pytest.approx(0, abs=1e-12) and colours["nearest"] == 0
    assert "3 features of test_inception:mean_colours" in judge.how


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("inceptoin", r"fidelity=inceptoin: there are no such features; expected inception:FILE"),
        ("inception:", "there are no such features"),
        ("no_such_module:see", "cannot be imported .* or inception:FILE"),
        ("test_inception:_one", r"gave float32\[1, 3\] for pictures \[2, 32, 32, 3\]; expected finite floats \[2, D\]"),
        ("test_inception:_nan", "expected finite floats"),
        ("inception:nowhere.safetensors", "nowhere.safetensors: no such file; convert"),
    ],
)
def test_features_that_cannot_be_had_are_refused(held_out, spec, message):
    with pytest.raises(UserError, match=message):
        judge_of(held_out, spec)


def test_features_without_references_are_refused():
    with pytest.raises(UserError, match=r"references must be at least 1 for judges.fidelity=a:b .*--references=1000"):
        EvaluationSettings(references=0, judges={"fidelity": "a:b"})


def test_files_of_something_else_are_refused(tensors, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"weights.pth: expected a file .safetensors, since nothing is unpickled; conv"):
        load_inception(path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"PK" * 40)
    with pytest.raises(UserError, match=r"not a readable safetensors file .*convert pytorch-fid's"):
        load_inception(path)
    name = "Mixed_7c.branch_pool.bn.bias"
    small = {k: v for k, v in tensors.items() if k != name and v.ndim < 2}
    save_file({**small, "fc.bias": np.zeros(1000, np.float32), "AuxLogits.fc.bias": np.zeros(1000, np.float32)}, path)
    message = (
        r"weights.safetensors: not the weights of FID's Inception-v3. missing tensors: Conv2d_1a_3x3.conv.weight, .* "
        r"and 9\d more; unexpected tensors: AuxLogits.fc.bias; wrong shapes: fc.bias \(found \[1000\], expected "
        r"\[1008\]\); convert pytorch-fid's"
    )
    with pytest.raises(UserError, match=message):
        load_inception(path)
