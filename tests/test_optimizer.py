"""Options of the step: each schedule and optimizer is the one it is called; less memory changes nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType

from mcm_jax import losses, sharding
from mcm_jax.errors import UserError
from mcm_jax.mcm import MCM, Modulator, Size
from mcm_jax.modalities import Modality
from mcm_jax.schedules import Schedule
from mcm_jax.training import state, step
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("quick")

SHAPE, BATCH = (16, 16, 3), 8
SETTINGS = {"steps": 100, "learning_rate": 1e-3, "warmup_steps": 10, "decay_steps": 20}


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",  # at the end of the warm-up, halfway from there to the end, at 80, 90, 99 and 100
    [
        ("cosine", [1, 0.5, (1 + np.cos(np.pi * 7 / 9)) / 2, (1 + np.cos(np.pi * 8 / 9)) / 2, 3.046e-4, 0]),
        ("linear", [1, 0.5, 2 / 9, 1 / 9, 1 / 90, 0]),
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("wsd", [1, 1, 1, 0.5, 1 / 20, 0]),
    ],
)
def test_schedules_by_hand(name, expected):
    schedule = jax.jit(make_schedule(name, **SETTINGS))
    rates = np.array([schedule(i) for i in range(101)])
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates[:11], 1e-3 * np.linspace(0, 1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[[10, 55, 80, 90, 99, 100]], 1e-3 * np.array(expected), rtol=1e-3, atol=1e-9)
    assert (np.diff(rates[10:]) <= 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_short_runs_without_warm_up_and_without_end(name):
    shorter = () if name in ("constant", "wsd") else ({"steps": 1}, {"steps": 2})
    for changes in (*shorter, {"warmup_steps": 0}):
        schedule = make_schedule(name, **SETTINGS | {"warmup_steps": 100} | changes)
        last = changes.get("steps", 1) - 1  # the first one at the full rate
        assert float(schedule(last)) == pytest.approx(1e-3)
    assert float(schedule(10**6)) == pytest.approx(1e-3 if name == "constant" else 0, abs=1e-9)


@pytest.mark.parametrize("name, same", [("constant", 40), ("wsd", 20)])
@pytest.mark.parametrize("warmup", [30, 40, 60])
def test_a_run_that_ends_in_its_warm_up_is_that_of_a_longer_one(name, same, warmup):
    """Up to its decay, where there is one; which still reaches zero with the step after the last one."""
    changes = {"warmup_steps": warmup, "decay_steps": 20}
    short, long = (make_schedule(name, **SETTINGS | changes | {"steps": steps}) for steps in (40, 400))
    assert [float(short(i)) for i in range(same)] == [float(long(i)) for i in range(same)]
    assert float(short(same - 1)) > 0 and float(long(warmup)) == pytest.approx(1e-3)
    if name == "wsd":
        rates = np.array([short(i) for i in range(20, 42)])
        assert rates.dtype == np.float32 and (rates[:-2] > 0).all() and (rates[-2:] == 0).all()
        assert (rates <= 1e-3 * np.minimum(1, np.arange(20, 42) / warmup) + 1e-9).all()


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    long, linear = (make_schedule(name, **SETTINGS | {"decay_steps": 1_000}) for name in ("wsd", "linear"))
    assert [float(long(i)) for i in range(101)] == [float(linear(i)) for i in range(101)]


def test_adamw_on_cosine_is_what_it_was_before_there_was_a_choice():
    """Runs of version 0.1 resume bit for bit: the same numbers, and a state of the same structure."""
    before = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
    schedule = make_schedule("cosine", **SETTINGS)
    assert str(jax.make_jaxpr(schedule)(3)) == str(jax.make_jaxpr(before)(3))
    assert [schedule(i) for i in range(101)] == [before(i) for i in range(101)]
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(before, weight_decay=0.01))
    new = make_optimizer("adamw", schedule, weight_decay=0.01, clip_norm=1.0)
    assert jax.tree.structure(new.init(TREE)) == jax.tree.structure(old.init(TREE))
    without = make_optimizer("adamw", schedule, weight_decay=0.01, clip_norm=0.0)
    assert jax.tree.structure(without.init(TREE)) == jax.tree.structure(optax.adamw(before).init(TREE))
    with jax.numpy_dtype_promotion("standard"):
        tiny.assert_same_bits(updates_of(new), updates_of(old))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="^train.schedule: found 'step', expected one of cosine, linear, constant, wsd$"
    ):
        make_schedule("step", **SETTINGS)
    with pytest.raises(UserError, match="^train.optimizer: found 'sgd', expected one of adamw, lion, muon$"):
        make_optimizer("sgd", optax.constant_schedule(1.0), weight_decay=0.0, clip_norm=0.0)
    with pytest.raises(UserError, match="^train.decay_steps: found 0, expected at least 1.*train.schedule=constant"):
        make_schedule("wsd", **SETTINGS | {"decay_steps": 0})


# --- optimizers -----------------------------------------------------------------------------------------------------

_rng = np.random.default_rng(0)
TREE = {"conv": _rng.normal(size=(3, 3, 4, 6)), "dense": _rng.normal(size=(5, 4)), "bias": _rng.normal(size=6)}
TREE = jax.tree.map(jnp.float32, TREE)
# A large gradient, then a small one to the other side: whether the first is clipped is seen in the second update.
GRADIENTS = [jax.tree.map(lambda p: 10 * p, TREE), jax.tree.map(lambda p: -0.1 * p, TREE)]
RATE = optax.constant_schedule(1e-2)


def updates_of(optimizer, gradients=GRADIENTS):
    """Updates of :data:`TREE` by one gradient after another, the params as they are."""
    now, found = optimizer.init(TREE), []
    update = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, now = update(gradient, now, TREE)
            found.append(updates)
    return found


@pytest.fixture(scope="module", params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plain(name):
    """Updates without decay and clipping."""
    return updates_of(make_optimizer(name, RATE, weight_decay=0.0, clip_norm=0.0))


def test_weight_decay_is_decoupled_and_of_all_params(name, plain):
    decayed = updates_of(make_optimizer(name, RATE, weight_decay=0.5, clip_norm=0.0))
    for with_it, without in zip(decayed, plain, strict=True):
        for key in TREE:
            expected = without[key] - 1e-2 * 0.5 * TREE[key]
            np.testing.assert_allclose(with_it[key], expected, rtol=1e-4, atol=1e-7, err_msg=key)


def test_clipping_is_that_of_the_whole_gradients_norm(name, plain):
    optimizer = make_optimizer(name, RATE, weight_decay=0.0, clip_norm=1.0)
    clipped = updates_of(optimizer)
    large, small = (np.sqrt(sum(np.square(g).sum() for g in gradient.values())) for gradient in GRADIENTS)
    assert small < large
    by_hand = [jax.tree.map(lambda g: g / large, GRADIENTS[0]), jax.tree.map(lambda g: g / max(small, 1), GRADIENTS[1])]
    expected = updates_of(make_optimizer(name, RATE, weight_decay=0.0, clip_norm=0.0), by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), clipped, expected)
    for key in TREE:
        assert np.abs(clipped[1][key] - plain[1][key]).max() > 1e-3, key


def test_the_rate_is_the_schedules(name, plain):
    schedule = make_schedule("linear", steps=4, learning_rate=2e-2, warmup_steps=0, decay_steps=0)  # 0.02, 0.015
    found = updates_of(make_optimizer(name, schedule, weight_decay=0.0, clip_norm=0.0))
    for key in TREE:
        np.testing.assert_allclose(found[0][key], 2.0 * plain[0][key], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[1][key], 1.5 * plain[1][key], rtol=1e-4, atol=1e-7)


def test_optimizers_differ():
    """From the second update on: Adam's first one, g / |g|, is Lion's."""
    found = [updates_of(make_optimizer(n, RATE, weight_decay=0.0, clip_norm=0.0))[1] for n in OPTIMIZERS]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert all(np.abs(one[key] - other[key]).max() > 1e-4 for key in TREE)


def test_a_state_comes_back_from_its_checkpoint(name, tmp_path):
    optimizer = make_optimizer(name, RATE, weight_decay=0.01, clip_norm=1.0)
    now = sharding.replicate(state.init_state(TREE, optimizer), sharding.make_mesh())
    checkpoints, meta = Checkpoints(tmp_path), {"base": "tiny", "fingerprint": "0" * 64}
    checkpoints.save(now, meta)
    found, _ = checkpoints.restore(now, meta)
    checkpoints.close()
    tiny.assert_same_bits(found, now)


def test_muon_orthogonalises_convolutions_too():
    """A first update has singular values that are about the same, at Adam's size; vectors go by Adam."""
    gradient = jax.tree.map(lambda p: np.float32(p * np.geomspace(1, 100, p.shape[-1])), jax.device_get(TREE))
    muon, lion = (
        updates_of(make_optimizer(n, RATE, weight_decay=0.0, clip_norm=0.0), [gradient])[0] for n in ("muon", "lion")
    )
    for key, shape in (("conv", (36, 6)), ("dense", (5, 4))):
        given, values = (np.linalg.svd(a[key].reshape(shape), compute_uv=False) for a in (gradient, muon))
        assert given.max() > 20 * given.min() and values.max() < 2 * values.min(), key
        np.testing.assert_allclose(values, 1e-2 * 0.2 * np.sqrt(max(shape)), rtol=0.5)
    nadam = updates_of(optax.nadamw(RATE, weight_decay=0.0), [gradient])[0]
    np.testing.assert_allclose(muon["bias"], nadam["bias"], rtol=1e-5)
    for key in TREE:
        np.testing.assert_allclose(lion[key], -1e-2 * jnp.sign(TREE[key]), rtol=1e-5)


# --- the step -------------------------------------------------------------------------------------------------------

MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "map", 1))
MODULATOR = Modulator(
    MCM(Size(8, (1,), 1, (False,), groups=4), ("x_t", "eps", "x0")),
    MODALITIES,
    Schedule.from_config({"_class_name": "DDPMScheduler"}),
    shift_space="x0",
)
REMAT = dataclasses.replace(MODULATOR, module=MODULATOR.module.clone(remat=True))
# By default the CPU's order of operations is another one, in which remat saves nothing.
SAVING = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def shapes_of(modulator):
    return jax.eval_shape(lambda: modulator.init(jax.random.key(0), SHAPE))


@pytest.fixture(scope="module")
def params():
    """An MCM with no parameter at zero; numpy arrays, which no step can take away."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.15, s.shape).astype(np.float32), shapes_of(MODULATOR))


@pytest.fixture(scope="module")
def record():
    rng = np.random.default_rng(1)
    normal = {key: rng.standard_normal((BATCH, *SHAPE)).astype(np.float32) for key in ("x_t", "eps", "noise")}
    conditions = {
        "segmentation": rng.integers(0, 6, (BATCH, *SHAPE[:2])).astype(np.uint8),
        "sketch": rng.random((BATCH, *SHAPE[:2]), np.float32),
    }
    return normal | {
        "t": rng.integers(0, 1000, BATCH).astype(np.int32),
        "importance": rng.uniform(0.5, 1.5, BATCH).astype(np.float32),
        "conditions": conditions,
        "present": rng.random((BATCH, 2)) < 0.7,
    }


# Plain SGD at a rate of 1: a step's change of the params is the gradient. Adam would blow up rounding errors.
SGD = optax.sgd(1.0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step of :data:`SGD`."""

    run: jax.stages.Compiled

    @classmethod
    def of(cls, modulator, params, record, **options):
        train_step = make_sgd_step(modulator, **options)
        return cls(train_step.lower(begin(params), record).compile(compiler_options=SAVING))

    def __call__(self, params, record):
        """``(gradient, state, metrics)`` of a step."""
        now, metrics = jax.device_get(self.run(begin(params), record))
        return jax.tree.map(lambda a, b: np.asarray(a) - b, params, now.params), now, metrics

    @property
    def memory(self):
        return self.run.memory_analysis().temp_size_in_bytes


def make_sgd_step(modulator=MODULATOR, *, weighting="v", **options):
    return step.make_train_step(modulator, SGD, weighting=weighting, l1=0.1, ema_decay=0.9, **options)


def begin(params):
    return state.TrainState(np.int32(0), params, params, SGD.init(params))


@pytest.fixture(scope="module")
def whole(params, record):
    return Program.of(MODULATOR, params, record)


def assert_same_step(found, expected):
    """Within float32 rounding of the gradient's size."""
    scale = float(expected[2]["gradient_norm"])
    gradients = [np.abs(g).max() for g in jax.tree.leaves(expected[0])]
    assert np.median(gradients) > 1e-3 * scale
    for a, b in zip(found, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale), a, b)


def test_each_optimizer_learns(name, whole, params, record):
    """Three steps on a fixed batch, each of which lowers the loss."""
    optimizer = make_optimizer(name, optax.constant_schedule(1e-3), weight_decay=0.01, clip_norm=1.0)

    @jax.jit
    def update(gradient, opt_state, now):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state, now)
        return optax.apply_updates(now, updates), opt_state

    now, opt_state, found = params, jax.jit(optimizer.init)(params), []
    for _ in range(4):
        gradient, _, metrics = whole(now, record)
        found.append(float(metrics["loss"]))
        now, opt_state = jax.device_get(update(gradient, opt_state, now))
    assert found[0] > found[1] > found[2] > found[3], found


def test_accumulation_is_the_whole_batch_in_less_memory(whole, params, record):
    parts = Program.of(MODULATOR, params, record, accumulate=4)
    assert_same_step(parts(params, record), whole(params, record))
    print(f"temporary memory: {whole.memory:,} bytes, {parts.memory:,} in four parts")
    assert parts.memory < 0.4 * whole.memory


def test_accumulation_leaves_each_device_its_own_rows(whole, params, record):
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    rows, now = sharding.split_batch(record, mesh), sharding.replicate(begin(params), mesh)
    program = make_sgd_step(accumulate=4).lower(now, rows).compile()
    now, metrics = jax.device_get(program(now, rows))
    assert_same_step((jax.tree.map(np.subtract, params, now.params), now, metrics), whole(params, record))
    text = program.as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]


def test_a_batch_that_cannot_be_split_is_refused(params, record):
    with pytest.raises(UserError, match="^train.accumulate: found 3, expected a divisor of the batch of 8"):
        make_sgd_step(accumulate=3).lower(begin(params), record)


def test_remat_is_the_same_mcm_in_less_memory(whole, params, record):
    assert shapes_of(REMAT) == shapes_of(MODULATOR)
    again = Program.of(REMAT, params, record)
    assert_same_step(again(params, record), whole(params, record))
    print(f"temporary memory: {whole.memory:,} bytes, {again.memory:,} with remat")
    assert again.memory < 0.95 * whole.memory

    def kept(modulator):
        """Bytes that the forward pass leaves to the backward pass, on any device."""
        inputs = [record[key] for key in ("x_t", "eps", "t", "conditions", "present")]
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: modulator(p, *inputs), p)[1], params)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(backward))

    assert kept(REMAT) < 0.2 * kept(MODULATOR)


def test_the_step_weighs_by_its_gamma(params, record, monkeypatch):
    seen, weight = [], losses.weight
    monkeypatch.setattr(losses, "weight", lambda *args: seen.append(args) or weight(*args))
    train_step = step.make_train_step(MODULATOR, SGD, weighting="min_snr", l1=0.0, ema_decay=0.9, snr_gamma=2.0)
    jax.eval_shape(train_step, begin(params), record)
    assert [(args[0], args[3]) for args in seen] == [("min_snr", 2.0)]
