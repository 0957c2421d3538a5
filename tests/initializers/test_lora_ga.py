"""LoRA-GA: the function is unchanged before training, and a first step along the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.core.algebra import delta
from lora_jax.core.errors import ConfigError, StructureError, TargetError
from tests.parity.peft.from_data import RECORDED, recorded_model, recorded_params
from tests.programs import weights_of_each_kind
from tests.programs.weights_of_each_kind import INPUTS, PARAMS, RANK, ROWS

pytestmark = pytest.mark.usefixtures("quick_compile")
SCALE = weights_of_each_kind.ALPHA / RANK
ROW = pytest.mark.parametrize("row", ROWS, ids=str)


def value(params, inputs):
    """A loss that every weight of the table takes part in."""
    outs = weights_of_each_kind.program(params, inputs)
    return sum(
        jnp.sin(y * (1 + jnp.arange(y.size).reshape(y.shape) % 3)).mean() for y in outs.values()
    )


def other(inputs):
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x[::-1] / 2, inputs)


BATCHES = [(INPUTS,), (other(INPUTS),)]


@functools.cache
def started(scale="stable"):
    return lora_jax.lora_ga(
        value, weights_of_each_kind.initialized("kaiming"), BATCHES, scale=scale
    )


@functools.cache
def gradient():
    """∂L/∂W as matrices [batch, in, out], the mean over both batches."""
    mean = lambda params: sum(value(params, *batch) for batch in BATCHES) / 2
    found = jax.jit(jax.grad(mean))(PARAMS)
    return {row.name: row.matrices(np.asarray(found[row.name], np.float64)) for row in ROWS}


@ROW
def test_the_function_at_the_start_is_the_bases(row):
    got = jax.jit(lora_jax.lora(weights_of_each_kind.program, on_dense="error"))(started(), INPUTS)
    want = jax.jit(weights_of_each_kind.program)(PARAMS, INPUTS)
    # A base in bfloat16 is rounded when it changes: half a unit in 2⁻⁸ for each of 24 inputs.
    atol = 0.05 if row.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(got[row.name], want[row.name], atol=atol)
    node = started()[row.name]
    assert node.w.dtype == row.dtype and node.a.dtype == jnp.float32
    assert float(jnp.abs(node.w.astype(jnp.float32) - PARAMS[row.name]).max()) > 0.01


@ROW
def test_factors_are_the_gradients_directions(row):
    """A: the first `rank` on the side of the inputs; B: the next `rank` on that of the outputs."""
    _, a, b = weights_of_each_kind.as_matrices(row, started()[row.name])
    u, s, vt = np.linalg.svd(gradient()[row.name])
    size = np.sqrt(np.sqrt(b.shape[-1])) / np.sqrt(16)
    for i in range(len(a)):
        # of directions that the gradient does not have any will do
        there = (s[i] > 1e-3 * s[i, 0]) & (row.dtype == jnp.float32)
        for found, want, has in (
            (a[i].T, u[i].T[:RANK], there[:RANK]),
            (b[i], vt[i, RANK : 2 * RANK], there[RANK : 2 * RANK]),
        ):
            np.testing.assert_allclose(found @ found.T, size**2 * np.eye(RANK), atol=1e-4)
            cosines = np.abs((found * want).sum(-1)) / size
            np.testing.assert_allclose(cosines[has], 1, atol=1e-3)


def moved(params, rate=1e-4):
    """What one step of SGD on A and B moves each weight by, as matrices."""
    base, adapters = lora_jax.split(params)

    @jax.jit
    def update(base, adapters):
        program = lora_jax.lora(value)
        loss = lambda a: sum(program(lora_jax.join(base, a), *batch) for batch in BATCHES)
        grads = jax.grad(loss)(adapters)
        stepped = jax.tree.map(lambda x, g: x - rate * g, adapters, grads)
        return lora_jax.merge(lora_jax.join(base, stepped), jnp.float32)

    before, after = lora_jax.merge(params, jnp.float32), update(base, adapters)
    return {row.name: row.matrices(np.asarray(after[row.name] - before[row.name])) for row in ROWS}


def cosine(x, y):
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


@functools.cache
def steps():
    return {
        "lora_ga": moved(started()),
        "kaiming": moved(weights_of_each_kind.initialized("kaiming")),
    }


@ROW
def test_the_first_step_is_nearer_to_full_fine_tunings(row):
    """It is along G cut to rank 2r, whose cosine with G is ‖G_2r‖/‖G‖."""
    full = -gradient()[row.name]
    ours, usual = (cosine(steps()[name][row.name], full) for name in ("lora_ga", "kaiming"))
    best = np.sqrt(1 - weights_of_each_kind.tail(full, 2 * RANK) ** 2 / (full**2).sum())
    assert ours > usual
    assert ours == pytest.approx(best, abs=0.02 if row.dtype == jnp.float32 else 0.05)


def test_wide_weights_take_a_sketch():
    """A gradient of rank 6 in a matrix of 600 × 520, exactly its own sketch."""
    left, right = (
        np.linalg.qr(np.asarray(weights_of_each_kind.normal(n, n, 6)))[0] for n in (600, 520)
    )
    target = jnp.asarray(left * 2.0 ** -np.arange(6) @ right.T)
    params = {"w": jnp.zeros((600, 520))}

    def loss(params, target):
        return (params["w"] * target).sum()

    adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=3))
    node = lora_jax.lora_ga(loss, adapted, [(target,)], scale="unit")["w"]
    np.testing.assert_allclose(jnp.abs(node.a.T @ left[:, :3]), np.eye(3), atol=1e-4)
    np.testing.assert_allclose(jnp.abs(node.b @ right[:, 3:]), np.eye(3), atol=1e-4)


def test_dora_and_leaves_trained_whole_keep_their_function():
    params = {"w": PARAMS["linear"], "bias": jnp.ones((1, 16))}

    def model(params, x):
        return x @ params["w"] + params["bias"]

    def loss(params, x):
        return jnp.sin(model(params, x)).mean()

    config = lora_jax.LoraConfig(rank=RANK, alpha=6, train=["bias"], dora=True)
    x = INPUTS["linear"]
    adapted = lora_jax.init(jax.random.key(0), params, config, model, x)
    got = lora_jax.lora_ga(loss, adapted, [(x,)])
    assert got["bias"] is adapted["bias"] and got["w"].magnitude is not None
    np.testing.assert_allclose(lora_jax.lora(model)(got, x), model(params, x), atol=1e-5)


def test_the_trained_adapter_moves_to_the_original_base():
    start = started()
    base, adapters = lora_jax.split(start)
    after = jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), adapters)
    overlay = lora_jax.on_original(start, after, PARAMS)
    got = lora_jax.merge(lora_jax.join(PARAMS, overlay))["linear"]
    want = lora_jax.merge(lora_jax.join(base, after))["linear"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_targets_are_started_in_several_calls():
    once = started()
    twice = lora_jax.lora_ga(
        value, weights_of_each_kind.initialized("kaiming"), BATCHES, targets=["linear"]
    )
    assert twice["conv"] is weights_of_each_kind.initialized("kaiming")["conv"]
    twice = lora_jax.lora_ga(value, twice, BATCHES, targets=["conv"])
    for name in ("linear", "conv"):
        np.testing.assert_allclose(delta(twice[name]), delta(once[name]), atol=1e-4)


# --- PEFT -----------------------------------------------------------------------------------------


def test_factors_and_bases_are_pefts():
    """Singular vectors have no sign of their own: every column and row is turned to PEFT's."""
    params = recorded_params()
    x, target = jnp.asarray(RECORDED["x"]), jnp.asarray(RECORDED["target"])

    def loss(params, x, target):
        return ((recorded_model(params, x) - target) ** 2).mean()

    config = lora_jax.LoraConfig(rank=2, alpha=4)
    adapted = lora_jax.init(jax.random.key(0), params, config, loss, x, target)
    halves = [(x[:128], target[:128]), (x[128:], target[128:])]  # of which the gradient is the mean
    got = lora_jax.lora_ga(loss, adapted, halves, scale="peft")
    for name in ("up", "down"):
        node, want = got[name], {k: RECORDED[f"lora_ga/{name}.{k}"] for k in "abw"}
        a = node.a * jnp.sign((node.a * want["a"]).sum(0, keepdims=True))
        b = node.b * jnp.sign((node.b * want["b"]).sum(1, keepdims=True))
        np.testing.assert_allclose(a, want["a"], atol=1e-5)
        np.testing.assert_allclose(b, want["b"], atol=1e-5)
        np.testing.assert_allclose(params[name] - node.scale * a @ b, want["w"], atol=1e-5)
        np.testing.assert_allclose(node.w + node.scale * node.a @ node.b, params[name], atol=1e-5)
    y = lora_jax.lora(recorded_model)(got, x)
    np.testing.assert_allclose(y, RECORDED["lora_ga/y"], atol=1e-5)


# --- what it takes --------------------------------------------------------------------------------

W = {"w": jnp.ones((6, 5)) + jnp.eye(6, 5)}
X = jnp.linspace(-1, 1, 24).reshape(4, 6)


def loss(params, x):
    return jnp.sin(x @ params["w"]).mean()


def fresh(rank=2, **fields):
    config = lora_jax.LoraConfig(rank=rank, **fields)
    return lora_jax.init(jax.random.key(0), W, config, loss, X)


BAD = {
    "no batch": (ConfigError, {"batches": []}, "batches is empty"),
    "no scalar": (ConfigError, {"loss": lambda p, x: x @ p["w"]}, "scalar"),
    "a loss of integers": (ConfigError, {"loss": lambda p, x: 3}, "scalar"),
    "another scale": (ConfigError, {"scale": "huge"}, "scale must be one of"),
    "gamma zero": (ConfigError, {"gamma": 0}, "gamma must be"),
    "too large a rank": (TargetError, {"params": fresh(3)}, "w: .*Lower its rank to 2"),
    "no dependence": (TargetError, {"loss": lambda p, x: x.sum()}, "w: the loss does not depend"),
    "infinity": (TargetError, {"loss": lambda p, x: jnp.log(p["w"] * 0).sum()}, "w: the grad.*NaN"),
    "no target": (TargetError, {"targets": ["nope"]}, "nearest paths"),
    "no adapters": (StructureError, {"params": W}, "init"),
    "an update": (StructureError, {"params": jax.tree.map(lambda x: x + 1, fresh())}, "neither A"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_to_do(name):
    error, changes, message = BAD[name]
    given = {"loss": loss, "params": fresh(), "batches": [(X,)]} | changes
    with pytest.raises(error, match=message):
        lora_jax.lora_ga(given.pop("loss"), given.pop("params"), given.pop("batches"), **given)
