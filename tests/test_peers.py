"""The peers in benchmarks/peers: equal to diffusers' where it has them, the base itself where nothing is trained."""

import dataclasses
import json
import types

import diffusers
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_unet2d_condition import CROSS_DOWN, CROSS_UP, DOWN, TINY, UP

from benchmarks import common
from benchmarks.peers import judge, judging, methods, nets, run, table, train, unet, world
from benchmarks.peers.method import Given
from configs import default
from mcm_jax import assets, sampling
from mcm_jax.base import Base
from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.base.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mcm_jax.base.weights import params_from_torch
from mcm_jax.errors import UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.mcm import estimate_x0
from mcm_jax.modalities import Modality, stack
from mcm_jax.pipeline import Pipeline
from mcm_jax.schedules import Schedule
from mcm_jax.sharding import make_mesh
from mcm_jax.trained import Trained

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

SCHEDULE = Schedule.from_config({"_class_name": "DDPMScheduler"})
MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
# label -> (config, height and width, the condition's size over the latents', the condition's channels)
CONFIGS = {
    "two levels, 1/4": (TINY, (8, 12), 4, 3),
    "uneven widths, heads of each level, 1/8": (
        TINY
        | {"block_out_channels": (12, 8, 20), "attention_head_dim": (3, 2, 4), "layers_per_block": 2}
        | {"down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN), "up_block_types": (UP, CROSS_UP, CROSS_UP)},
        (8, 4),
        8,
        9,
    ),
    "linear projection, pixels": (TINY | {"use_linear_projection": True, "block_out_channels": (8, 12)}, (4, 8), 1, 2),
}


def nchw(a):
    return torch.from_numpy(np.asarray(a).transpose(0, 3, 1, 2).copy())


def close(ours, theirs):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)


def arrays_of(net):
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def randomised(net):
    """Zero convolutions, too: else nothing would be compared."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.1 + (p.ndim == 1))
    return net.eval()


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request):
    """diffusers' U-Net and ours, with what both are asked."""
    config, (height, width), factor, channels = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = randomised(diffusers.UNet2DConditionModel(**config))
    ours = UNet2DCondition(UNet2DConditionConfig.from_dict(config))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 4)).astype(np.float32)
    context = rng.standard_normal((2, 5, 6)).astype(np.float32)
    condition = rng.random((2, factor * height, factor * width, channels)).astype(np.float32)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), x, jnp.zeros(2, jnp.int32), context)["params"]
    params = params_from_torch(arrays_of(theirs), shapes, np.float32)
    return theirs, ours, params, (x, np.array([3, 700], np.int32), context), condition, factor


def asked(arguments):
    x, t, context = arguments
    return {"sample": nchw(x), "timestep": torch.from_numpy(t), "encoder_hidden_states": torch.from_numpy(context)}


def test_controlnet_is_diffusers(pair):
    theirs, ours, params, arguments, condition, factor = pair
    widths = nets._HINT[: factor.bit_length()]
    hint = {"conditioning_channels": condition.shape[-1], "conditioning_embedding_out_channels": widths}
    control = diffusers.ControlNetModel(
        **{k: v for k, v in theirs.config.items() if k in diffusers.ControlNetModel.__init__.__annotations__} | hint
    )
    randomised(control)
    ours_params = params_of_controlnet(control, ours, params, condition, arguments)
    with torch.no_grad():
        down, middle = control(**asked(arguments), controlnet_cond=nchw(condition), return_dict=False)
        whole = theirs(
            **asked(arguments), down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    @jax.jit
    def run_ours(params, control_params, condition, *arguments):
        embedding = nets.Hint(ours.config.block_out_channels[0], factor.bit_length() - 1)
        hint = embedding.apply({"params": control_params["controlnet_cond_embedding"]}, condition)
        skips, middle = unet.encode(ours, control_params["copy"], *arguments, hint=hint)
        zeros = [control_params[f"controlnet_down_blocks_{i}"] for i in range(len(skips))]
        residuals = [nets.zero_convolution(p, s) for p, s in zip(zeros, skips, strict=True)]
        middle = nets.zero_convolution(control_params["controlnet_mid_block"], middle)
        return residuals, middle, unet.forward(ours, params, *arguments, residuals=residuals, middle=middle)

    residuals, middle_, whole_ = run_ours(params, ours_params, condition, *arguments)
    assert len(residuals) == len(down)
    for one, other in zip([*residuals, middle_, whole_], [*down, middle, whole], strict=True):
        close(one, other)


def params_of_controlnet(control, ours, unet_params, condition, arguments):
    """diffusers' weights by our names."""
    tensors = arrays_of(control)
    own = {k: v for k, v in tensors.items() if k.startswith("controlnet_")}
    kept = {n: p for n, p in unet_params.items() if not n.startswith(("up_", "conv_norm_out", "conv_out"))}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), kept)
    copy = params_from_torch({k: v for k, v in tensors.items() if k not in own}, shapes, np.float32)
    embedding = nets.Hint(ours.config.block_out_channels[0], int(np.log2(condition.shape[1] // arguments[0].shape[1])))
    hint = jax.eval_shape(embedding.init, jax.random.key(0), condition)["params"]
    expected = {"controlnet_cond_embedding": hint}
    for name, value in own.items():
        parts = name.split(".")
        if parts[0] == "controlnet_down_blocks" and parts[2] == "weight":
            c = value.shape[0]
            expected[f"controlnet_down_blocks_{parts[1]}"] = _convolution(c)
    expected["controlnet_mid_block"] = _convolution(tensors["controlnet_mid_block.bias"].shape[0])
    return {"copy": copy} | params_from_torch(own, expected, np.float32)


def _convolution(c):
    shape = jax.ShapeDtypeStruct
    return {"kernel": shape((1, 1, c, c), jnp.float32), "bias": shape((c,), jnp.float32)}


def test_adapter_is_diffusers(pair):
    theirs, ours, params, arguments, condition, factor = pair
    widths = ours.config.block_out_channels
    adapter = diffusers.T2IAdapter(
        in_channels=condition.shape[-1], channels=list(widths), downscale_factor=factor, adapter_type="full_adapter"
    )
    torch.manual_seed(1)
    with torch.no_grad():
        features = adapter(nchw(condition))
        # diffusers consumes the list
        whole = theirs(**asked(arguments), down_intrablock_additional_residuals=[f.clone() for f in features]).sample
    net = nets.Adapter(tuple(widths), factor)
    flat = {name.removeprefix("adapter.").replace(".", "_"): value for name, value in arrays_of(adapter).items()}
    mine = {}
    for name, value in flat.items():
        module, _, leaf = name.rpartition("_")
        mine.setdefault(module, {})[{"weight": "kernel"}.get(leaf, leaf)] = (
            value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        )
    found, whole_ = jax.jit(
        lambda params, own, condition, *arguments: (
            net.apply({"params": own}, condition),
            unet.forward(ours, params, *arguments, features=net.apply({"params": own}, condition)),
        )
    )(params, mine, condition, *arguments)
    for one, other in zip([*found, whole_], [*features, whole], strict=True):
        close(one, other)


def base_of(text):
    """A base with random weights: pixels without text, or as if they were latents with it."""
    key, context = jax.random.key(0), None
    if text:
        config = TINY | {"in_channels": 3, "out_channels": 3}
        net, context = UNet2DCondition(UNet2DConditionConfig.from_dict(config)), jnp.ones((2, 3, 6))
    else:
        net = UNet2D(
            UNet2DConfig(
                block_out_channels=(8, 12),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
            )
        )
    shape = (8, 16, 3)
    more = () if context is None else (context,)
    params = jax.jit(net.init)(key, jnp.zeros((2, *shape)), jnp.zeros(2, jnp.int32), *more)["params"]
    encoder = object() if text else None  # no prompt is embedded here
    base = Base("random", {"unet": params}, net, SCHEDULE, shape, shape, "0" * 64, text_encoder=encoder)
    rng = np.random.default_rng(0)
    conditions = {
        "segmentation": rng.integers(0, 6, (2, 8, 16)).astype(np.int32),
        "sketch": rng.random((2, 8, 16)).astype(np.float32),
    }
    x = rng.standard_normal((2, *shape)).astype(np.float32)
    return base, Given(x, jnp.array([5, 800]), conditions, jnp.array([[True, True], [True, False]]), context)


@pytest.mark.parametrize(
    "kind, text",
    [
        (methods.FullFineTuning, False),
        (methods.LoRA, False),
        (methods.ControlNet, False),
        (methods.ControlNet, True),
    ],
)
def test_untrained_it_is_the_base_and_learns(kind, text):
    base, given = base_of(text)
    method = kind(base, MODALITIES)
    params = jax.jit(method.init)(jax.random.key(0), base.params)
    expected = jax.jit(base.predict)(base.params, given.x_t, given.t, given.context)

    @jax.jit
    def both(params, given):
        call = lambda p: method(p, base.params, given, method.prepare(p, base.params, given))  # noqa: E731
        return call(params), jax.grad(lambda p: jnp.square(call(p) - 1).mean())(params)

    eps, gradient = both(params, given)
    np.testing.assert_allclose(eps, expected, atol=1e-5)
    # Two steps of descent: behind zeros, the first moves the zeros alone.
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, both(params, given)[1])
    other = {k: v[:, ::-1] for k, v in given.conditions.items()}
    changed = both(params, given)[0] - both(params, given._replace(conditions=other))[0]
    assert float(jnp.abs(changed[0]).max()) > 1e-6
    hidden = given._replace(present=jnp.zeros((2, 2), bool))
    still = both(params, hidden)[0] - both(params, hidden._replace(conditions=other))[0]
    np.testing.assert_allclose(still, 0, atol=1e-7)


def test_full_fine_tuning_is_a_widened_first_convolution():
    base, given = base_of(False)
    method = methods.FullFineTuning(base, MODALITIES)
    params = jax.jit(method.init)(jax.random.key(0), base.params)
    kernel = jax.random.normal(jax.random.key(1), params["seen"]["conv_in"]["kernel"].shape) * 0.1
    params["seen"]["conv_in"]["kernel"] = kernel
    config = dict(vars(base.unet.config)) | {"in_channels": 3 + kernel.shape[2]}
    wide = UNet2D(UNet2DConfig(**config))
    own = jax.tree.map(jnp.asarray, params["unet"])
    own["conv_in"] = own["conv_in"] | {"kernel": jnp.concatenate([own["conv_in"]["kernel"], kernel], 2)}
    channels = stack(MODALITIES, given.conditions, given.present)
    expected = jax.jit(wide.apply)({"params": own}, jnp.concatenate([given.x_t, channels], -1), given.t)
    prepared = method.prepare(params, base.params, given)
    np.testing.assert_allclose(jax.jit(method.__call__)(params, base.params, given, prepared), expected, atol=1e-5)


def test_judge_leads_to_the_labels():
    base, given = base_of(False)
    net = load_segmenter(assets.resolve("scenes-segmenter"))
    shape = (32, 32, 3)
    x = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 6, (2, 32, 32)).astype(np.int32)
    base = dataclasses.replace(base, latent_shape=shape, image_shape=shape)
    conditions = {"segmentation": labels, "sketch": np.zeros((2, 32, 32), np.float32)}
    given = Given(x, jnp.array([300, 300]), conditions, jnp.array([[True, True], [False, True]]))
    method = judge.JudgeGuidance(base, MODALITIES, net, "segmentation")

    @jax.jit
    def likelihood(eps):
        alpha, sigma = SCHEDULE.alpha(given.t), SCHEDULE.sigma(given.t)
        x0 = estimate_x0(given.x_t, eps, alpha, sigma, 1e9)
        return method.log_likelihood(x0, jnp.asarray(labels))

    eps = jax.jit(base.predict)(base.params, given.x_t, given.t)
    guided = jax.jit(method.__call__)({"scale": jnp.float32(0.01)}, base.params, given, None)
    before, after = likelihood(eps), likelihood(guided)
    assert after[0] > before[0]
    np.testing.assert_allclose(guided[1], eps[1], atol=1e-5)  # it was shown no labels


def test_samples_are_those_of_the_pipeline(sd_path):
    """Every method is sampled as the shipped MCMs are, text guidance and all."""
    changes = {"sampling.text_guidance": 3.0, "sampling.batch_size": 2, "sampling.sampler": "euler"}
    settings = tiny.settings_of(tiny.make_config(sd_path, changes))
    mesh = make_mesh()
    base = settings.base.load(mesh)
    modalities = settings.modalities.shown
    held_out = HeldOut(settings.data, base.card, modalities, 3)
    shared = world.World(settings, base, mesh, held_out, [], 1)
    modulator = settings.mcm.modulator(modalities, base)
    method = methods.Modulation(base, modulator)
    params = jax.jit(method.init)(jax.random.key(0), base.params)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    keys = sampling.sample_keys(4, 3)
    draw = judging.Drawer(shared, method, 3)
    found = draw(params, ("sketch",), np.arange(3), keys)
    pipeline = Pipeline(base, Trained(modulator, params), settings.sampling.but(steps=3, guidance=1.0), mesh)
    sketch = next(m for m in modalities if m.name == "sketch")
    maps = {"sketch": sketch.resize_all(held_out.conditions["sketch"], *pipeline.grid)}
    expected = np.clip(pipeline(maps, keys, prompts=held_out.captions), -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    more = draw(params, ("sketch",), np.arange(3), keys, judging.Guidance(1.5))
    expected = np.clip(pipeline(maps, keys, prompts=held_out.captions, guidance=1.5), -1, 1)
    np.testing.assert_allclose(more, expected, atol=1e-4)
    assert np.abs(found - more).max() > 1e-2


class ByHand:
    """A method guided by its own prediction when it is shown nothing."""

    needs_eps = guides_text = False

    def __init__(self, method, scale):
        self.method, self.scale, self.grid = method, scale, method.grid

    def prepare(self, params, base_params, given):
        hidden = given._replace(present=jnp.zeros_like(given.present))
        return tuple(self.method.prepare(params, base_params, shown) for shown in (given, hidden))

    def __call__(self, params, base_params, given, prepared):
        shown, hidden = (self.method(params, base_params, given, one) for one in prepared)
        return hidden + self.scale * (shown - hidden)


def test_guidance_by_the_own_prediction(sd_path):
    changes = {"sampling.text_guidance": 1.0, "sampling.batch_size": 2, "sampling.sampler": "euler"}
    settings = tiny.settings_of(tiny.make_config(sd_path, changes))
    mesh = make_mesh()
    base = settings.base.load(mesh)
    held_out = HeldOut(settings.data, base.card, settings.modalities.shown, 2)
    shared = world.World(settings, base, mesh, held_out, [], 1)
    method = methods.Adapter(base, settings.modalities.shown)
    params = jax.jit(method.init)(jax.random.key(0), base.params)
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    call = params, ("sketch",), np.arange(2), sampling.sample_keys(4, 2)
    own = judging.Drawer(shared, method, 2)(*call, judging.Guidance(2.0, own=True))
    np.testing.assert_allclose(own, judging.Drawer(shared, ByHand(method, 2.0), 2)(*call), atol=1e-4)
    assert np.abs(own - judging.Drawer(shared, method, 2)(*call, judging.Guidance(2.0))).max() > 1e-3
    kinds = [str(guidance) for guidance in judging.guidances_of(method)]
    assert kinds == ["1", "1.5", "1.5 own", "2", "2 own", "3", "3 own", "4", "4 own"]
    mcm = methods.Modulation(base, settings.mcm.modulator(settings.modalities.shown, base))
    assert [str(guidance) for guidance in judging.guidances_of(mcm)] == ["1", "1.5", "2", "3", "4"]


def test_cells_choose_their_guidance_and_go_on(tmp_path, monkeypatch):
    """A picture is the brighter the more guidance it has, and bright is good; what is drawn is counted."""
    drawn = []

    def draw(params, given, which, keys, guidance=judging.NONE):
        drawn.append(str(guidance))
        return np.full((len(which), 4, 4, 3), 0.1 * guidance.scale + 0.01 * guidance.own + params["w"], np.float32)

    class Brightness:
        conditional = True

        def __call__(self, images, which):
            return types.SimpleNamespace(numbers={"miou": float(images.mean())})

    shared = dataclasses.replace(world_of_scenes(), held_out=range(3), judges=[Brightness()])
    method = types.SimpleNamespace(needs_eps=False, guides_text=False, init=lambda *_: {"w": jnp.zeros(())})
    train = lambda rate, seed: ({"w": np.float32(rate)}, {"rate": rate, "seed": seed, "parameters": 1})  # noqa: E731
    cells = run.Cells(tmp_path, "full", shared, method, train, draw)
    cells.finish(1e-3, 2, [1.0, 1.5])
    found = json.loads((tmp_path / "guidance.json").read_text())
    assert found["best"] == "4 own" and len(found["scores"]) == 9
    report = tmp_path / "rate=0.001,seed=1.report.json"
    rows = json.loads(report.read_text())["rows"]
    assert {name.partition("@")[2] for name in rows} == {"", "1.5", "4 own"}
    assert rows["both@4 own"]["miou"] == pytest.approx(0.411, abs=1e-4)
    row = table.row_of(tmp_path, 2)
    assert row["guidance"] == "4 own" and row["missing"] == ["rate 0.0005", "rate 0.002"]
    drawn.clear()
    cells.finish(1e-3, 2, [1.0, 1.5])
    assert not drawn
    # Stopped between a training and its score, the same command goes on with the score.
    cell = tmp_path / "rate=0.001,seed=1.json"
    there = json.loads(cell.read_text())
    cell.write_text(json.dumps({k: v for k, v in there.items() if k not in ("score", "select")}))
    with monkeypatch.context() as m:
        m.setattr(cells, "train", None)
        assert cells.cell(1e-3, 1) == there and json.loads(cell.read_text()) == there
    drawn.clear()
    # Stopped between two guidances: what is there counts, the rest is named, and drawn by the same command.
    there = json.loads(report.read_text())
    there["rows"] = {name: numbers for name, numbers in rows.items() if "own" not in name}
    report.write_text(json.dumps(there))
    row = table.row_of(tmp_path, 2)
    assert row["missing"][2:] == ["rate 0.001, seed 1"] and row["both@4 own"]["miou"]["seeds"] == 1
    cells.finish(1e-3, 2, [1.0, 1.5])
    assert set(drawn) == {"4 own"} and table.row_of(tmp_path, 2)["both@4 own"]["miou"]["seeds"] == 2
    guided = run.Cells(tmp_path / "guided", "full", shared, method, train, draw, select=3.0)
    assert guided.cell(1e-3, 0)["score"] == pytest.approx(0.301, abs=1e-4) != cells.cell(1e-3, 0)["score"]


def test_refusals():
    base, _ = base_of(False)
    with pytest.raises(UserError, match=r"the peer 'controlnet' reaches into .* the base 'random' has a Other"):
        methods.ControlNet(dataclasses.replace(base, unet=type("Other", (), {})()), MODALITIES)
    net = load_segmenter(assets.resolve("scenes-segmenter"))
    with pytest.raises(UserError, match="a net of 6 classes; the data has segmentation .5."):
        judge.JudgeGuidance(base, (Modality("segmentation", "labels", 5),), net, "segmentation")
    with pytest.raises(UserError, match=r"full: a training step takes 3.00 GiB, and there are 2.00 GiB"):
        train.check_memory("full", 3 * 2**30, 2 * 2**30)


def test_a_teacher_is_of_the_rate_that_is_best_of_seed_0(tmp_path):
    """Other seeds, which are trained at that rate later, have no score."""
    shared = world_of_scenes()
    method = methods.make_method("mcm-tiny", shared.base, shared.modalities, shared.run.mcm)
    args = run.arguments().parse_args(["--config=scenes", f"--workdir={tmp_path}"])
    folder = run.folder_of(args, "mcm-tiny")
    folder.mkdir(parents=True)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), method.modulator.shapes(shared.base))
    for rate, seed, score in ((1e-3, 0, 0.4), (2e-3, 0, 0.6), (2e-3, 1, None)):
        said = {"rate": rate, "seed": seed} | ({} if score is None else {"score": score})
        (folder / f"rate={rate:.3g},seed={seed}.json").write_text(json.dumps(said))
        params = jax.tree.map(lambda p, rate=rate, seed=seed: p + np.float32(rate + seed), zeros)
        (folder / f"rate={rate:.3g},seed={seed}.msgpack").write_bytes(flax.serialization.to_bytes(params))
    for seed in (0, 1):
        found = run.teacher_of(args, "mcm-tiny", shared, seed)
        assert all((leaf == np.float32(2e-3 + seed)).all() for leaf in jax.tree.leaves(found))
    with pytest.raises(UserError, match="mcm-slim-distilled learns of mcm-slim, of which there is no training"):
        run.teacher_of(args, "mcm-slim", shared, 0)
    with pytest.raises(UserError, match="learns of mcm-tiny, of which seed 2 is not trained yet"):
        run.teacher_of(args, "mcm-tiny", shared, 2)


def world_of_scenes():
    """As much as is asked of it."""
    base, _ = base_of(False)
    settings = default.get_config()
    return world.World(tiny.settings_of(settings), base, make_mesh(), None, [], 1)


def test_best_rate_climbs_to_where_both_neighbours_are_worse():
    tried = []

    def measure(rate):
        tried.append(rate)
        return -abs(np.log2(rate / 8e-3))

    assert run.best_rate(measure, 1e-3) == 8e-3
    assert sorted(tried) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    # Where one has fallen off, the rate before the cliff is tried, too.
    assert run.best_rate(lambda rate: rate if rate < 3e-3 else 0.0, 1e-3) == pytest.approx(2e-3 * 2**0.5)
    assert run.best_rate(lambda rate: rate if rate < 2.5e-3 else 0.0, 1e-3) == 2e-3
    # Where other seeds fall back at it, it has fallen: the search goes on, with the rate before it.
    tried.clear()
    above = lambda rate: 10 + measure(rate)  # noqa: E731
    assert run.best_rate(above, 4e-3, keeps=lambda rate: rate < 7e-3) == pytest.approx(4e-3 * 2**0.5)
    assert run.best_rate(above, 4e-3, keeps=lambda rate: rate < 5e-3) == 4e-3
    assert sorted(set(tried)) == pytest.approx([2e-3, 4e-3, 4e-3 * 2**0.5, 8e-3, 16e-3])
    assert run.best_rate(above, 4e-3, keeps=lambda rate: False) == 8e-3
    assert run.best_of({2e-3: [0.8, 0.7], 4e-3: [0.9, 0.3]}) == 2e-3
    # Where all diverge, downwards.
    assert run.best_rate(lambda rate: -1.0 if rate > 1e-4 else -rate, 1e-3) < 1e-4
    assert judging.score({"both": {"miou": 0.5}, "sketch": {}}) == -1.0


def test_a_table_names_what_is_missing_and_never_fills_it(tmp_path):
    def guided(rate):
        said = {"rate": rate, "best": "2", "scores": {"1": 0.6, "2": 0.7}}
        (tmp_path / "guidance.json").write_text(json.dumps(said))

    def write(rate, seed, score, miou=None):
        cell = {"rate": rate, "seed": seed, "score": score, "parameters": 5, "seconds": 1.0}
        (tmp_path / f"rate={rate:.3g},seed={seed}.json").write_text(json.dumps(cell))
        if miou is not None:
            report = {"rate": rate, "seed": seed, "rows": {"both": {"miou": miou}, "both@2": {"miou": miou + 0.1}}}
            (tmp_path / f"rate={rate:.3g},seed={seed}.report.json").write_text(json.dumps(report))

    assert table.row_of(tmp_path, 3) == {"missing": ["all"]}
    write(1e-3, 0, 0.5)
    write(2e-3, 0, 0.7, 0.71)
    row = table.row_of(tmp_path, 3)
    assert row["missing"] == ["rate 0.004", "guidance", "rate 0.002, seed 1", "rate 0.002, seed 2"]
    guided(1e-3)
    assert "guidance" in table.row_of(tmp_path, 3)["missing"]  # chosen at another rate
    guided(2e-3)
    assert row["both"]["miou"] == {"mean": 0.71, "interval": None, "seeds": 1}
    write(4e-3, 0, 0.6)
    write(2e-3, 1, 0.7, 0.73)
    row = table.row_of(tmp_path, 2)
    assert row["missing"] == [] and row["rate"] == 2e-3 and row["fell_back"] == {}
    assert row["both"]["miou"]["mean"] == pytest.approx(0.72) and row["both"]["miou"]["interval"] > 0.02
    text = table.markdown({"mcm-tiny": row, "full": table.row_of(tmp_path / "full", 2)})
    assert "| mcm-tiny | 5 | 0.002 | 1 | 0.720 +- " in text and "| mcm-tiny | 5 | 0.002 | 2 (best) | 0.820 +- " in text
    assert "| full | - |" in text and text.endswith("| all |")
    write(2e-3, 1, 0.3)
    row = table.row_of(tmp_path, 2)
    assert row["rate"] == 4e-3 and row["fell_back"] == {"0.002": [0.7, 0.3]} and "rate 0.008" in row["missing"]


def test_cells_of_other_settings_are_refused_by_the_keys_that_differ(tmp_path):
    file = tmp_path / "cells" / "settings.json"
    settings = {"pairs": 8, "config": {"mcm": {"x0_clip": 4.0, "multipliers": (1, 2)}, "seed": 0}}
    run.check_settings(file, settings)
    run.check_settings(file, settings)
    other = {"pairs": 8, "config": {"mcm": {"x0_clip": 0.0, "multipliers": (1, 2)}, "seed": 0}, "select": 2}
    words = r"other settings \(config.mcm.x0_clip: 4.0 there, 0.0 now; select: None there, 2 now\); take another"
    with pytest.raises(UserError, match=words):
        run.check_settings(file, other)
    assert 'x0_clip": 4.0' in file.read_text()
    with pytest.raises(SystemExit, match=words), common.plain_errors():  # as the commands say it
        run.check_settings(file, other)


def test_settings_of_adamw_by_cosine_are_those_of_before_there_was_a_choice():
    parser = run.arguments()
    run.add_optimizer(parser, "of all methods")
    run.add_selection(parser)
    assert run.selected_at(parser.parse_args([])) == {}
    assert run.selected_at(parser.parse_args(["--select_guidance=3"])) == {"select_guidance": 3.0}
    assert run.trained_with(parser.parse_args([])) == {}
    assert run.trained_with(parser.parse_args(["--schedule=wsd"])) == {"trained_with": ["adamw", "wsd"]}
