"""EVA against singular vectors of inputs that were kept, on programs that keep none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.core.errors import ConfigError, StructureError, TargetError
from lora_jax.initializers.eva import redistribute, top_components
from tests.engine.test_custom_rules import matmul, toy
from tests.initializers.observed_programs import PROGRAMS, D, N, inputs_of_size, normal
from tests.parity.peft.from_data import RECORDED, recorded_model, recorded_params
from tests.programs import CASES

pytestmark = pytest.mark.usefixtures("quick_compile")

FLAT = {"rho": 1.0}  # ranks stay as they are


def kept(inputs):
    """Directions [in, in] and what part of the variance each explains, of inputs [..., in]."""
    x = np.concatenate(
        [np.asarray(part, np.float64).reshape(-1, part.shape[-1]) for part in inputs]
    )
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt.T, s**2 / (s**2).sum()


def assert_spans(a, inputs, tolerance=1e-3):
    """A's columns are the top directions of the inputs, each up to its sign."""
    a = np.asarray(a, np.float64).reshape(-1, a.shape[-1])
    want = kept(inputs)[0][:, : a.shape[1]]
    np.testing.assert_allclose(np.abs(a.T @ want), np.eye(a.shape[1]), atol=tolerance)


def start(fn, params, *args, rank=2, **fields):
    params = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)
    config = lora_jax.LoraConfig(rank=rank, **fields)
    return lora_jax.init(jax.random.key(0), params, config, fn, *args)


# --- the directions -------------------------------------------------------------------------------


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]


def mlp_params(dtype=np.float32):
    params = {"up": normal(1, D, 9), "down": normal(2, 9, 5), "bias": np.ones((1, 5))}
    return {name: jnp.asarray(x, dtype) for name, x in params.items()}


def test_a_is_the_top_of_the_inputs_svd_and_b_zero():
    params, batches = mlp_params(), [(inputs_of_size(i, N, D),) for i in range(2)]
    adapted = lora_jax.eva(mlp, start(mlp, params, *batches[0], alpha=6), batches, **FLAT)
    hidden = [np.tanh(x @ np.asarray(params["up"])) for (x,) in batches]
    assert_spans(adapted["up"].a, [x for (x,) in batches])
    assert_spans(adapted["down"].a, hidden)
    for name in ("up", "down"):
        node = adapted[name]
        assert node.w is params[name] and node.rank == 2 and float(node.scale) == 3.0
        assert node.b.shape == (2, params[name].shape[1]) and not node.b.any()
    (x,) = batches[0]
    np.testing.assert_array_equal(lora_jax.lora(mlp)(adapted, x), mlp(params, x))


@pytest.mark.slow
def test_a_wide_weight_takes_a_sketch():
    """More inputs than a second moment is formed for; the singular values fall by 0.6 each."""
    n, wide = 30, 1100
    directions = np.linalg.qr(normal(3, wide, n))[0]
    x = normal(4, n, n) * 0.6 ** np.arange(n) @ directions.T
    params = {"w": normal(5, wide, 4)}

    def model(params, x):
        return x @ params["w"]

    adapted = start(model, params, x)
    assert_spans(lora_jax.eva(model, adapted, [(x[:10],), (x[10:],)], **FLAT)["w"].a, [x])


@pytest.mark.parametrize("whole", [True, False])
def test_components_of_a_matrix_of_low_rank_are_exact(whole):
    """Seven directions of twenty, seen through ten columns; of the other three nothing is left."""
    basis = np.linalg.qr(normal(1, 20, 7))[0]
    values = 3.0 ** np.arange(7, 0, -1)
    matrix = basis * values @ basis.T
    sketch = np.eye(20) if whole else np.linalg.qr(normal(2, 20, 10))[0]
    got, vectors = top_components(jnp.asarray(sketch), jnp.asarray(matrix @ sketch), 9)
    np.testing.assert_allclose(got, [*values, 0, 0], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(np.abs(vectors[:, :7].T @ basis), np.eye(7), atol=1e-3)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(9), atol=1e-4)


# --- programs of every kind, run as one -----------------------------------------------------------


@functools.cache
def results():
    """EVA on all programs at once, which compiles once."""
    programs = {name: build() for name, build in PROGRAMS.items()}
    params = {name: p.params for name, p in programs.items()}
    batch = ({name: p.args for name, p in programs.items()},)

    def everything(params, args):
        return [p.fn(params[name], *args[name]) for name, p in programs.items()]

    adapted = start(everything, params, *batch)
    return programs, lora_jax.eva(everything, adapted, [batch], **FLAT)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_shows_its_inputs(name):
    programs, adapted = results()
    for path, inputs in programs[name].inputs.items():
        node = adapted[name][path]
        assert node.a.shape == node.layout.a_shape(node.shape, 2)
        if "b" not in node.layout.axes:
            assert_spans(node.a, inputs)
        for a, met in zip(node.a, inputs, strict=False) if "b" in node.layout.axes else ():
            assert_spans(a, [met])


# --- the ranks ------------------------------------------------------------------------------------


def test_ranks_go_where_they_explain_most():
    share = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.4, 0.2, 0.15, 0.05], "c": [0.1, 0.1, 0.1, 0.1]}
    got = redistribute(share, dict.fromkeys(share, 2), dict.fromkeys(share, 1))
    # 0.5 a, 0.4 b, 0.3 a, 0.2 b, 0.15 b, then of the three 0.1 the first in the tree
    assert got == {"a": 3, "b": 3, "c": 0}


def test_a_stack_pays_for_every_layer():
    ratios = {"stack": [0.5, 0.3, 0.2], "head": [0.4, 0.25, 0.1]}
    spread = lambda ranks, layers: redistribute(ratios, ranks, {"stack": layers, "head": 1})
    # 8 to spend, 4 for each rank of the stack: 0.5, then 0.4, and what is left goes to the head
    assert spread({"stack": 1, "head": 4}, 4) == {"stack": 1, "head": 3}
    # as many as one weight each: by what they explain alone
    assert spread({"stack": 1, "head": 1}, 1) == {"stack": 1, "head": 1}
    assert spread({"stack": 2, "head": 1}, 1) == {"stack": 2, "head": 1}


def test_layers_that_are_left_out_neither_count_nor_pay():
    """Of the stack the first layer's inputs vary in all directions, the second one's along one."""
    params = {"stack": normal(1, 2, D, D), "head": normal(2, D, 4)}
    x = normal(3, N, D)
    along = lambda n: x * (np.arange(D) < n).astype(np.float32)

    def model(params, x, line, plane):
        first, second = params["stack"]
        return x @ first, line @ second, plane @ params["head"]

    batch = (x, along(1), along(2))
    adapted = start(model, params, *batch, rank=1)
    stack = adapted["stack"]
    # The stack's layers explain 0.6 in the mean, the head's two directions 0.5 each.
    both = lora_jax.eva(model, adapted, [batch])
    assert both["stack"].rank == both["head"].rank == 1
    # The first layer alone explains 0.2, so both ranks are the head's.
    first = dataclasses.replace(stack, scale=stack.scale.at[1].set(0))
    only = lora_jax.eva(model, adapted | {"stack": first}, [batch])
    assert only["stack"] is stack.w and only["head"].rank == 2


def test_ranks_of_a_model_follow_the_variance_and_none_grows_beyond_rho():
    params, x = mlp_params(), inputs_of_size(1, N, D)
    batches = [(x * jnp.array([[100.0, 1, 1, 1, 1, 1]]),)]  # one direction holds all
    adapted = start(mlp, params, x)
    got = {rho: lora_jax.eva(mlp, adapted, batches, rho=rho) for rho in (1.0, 1.5)}
    ranks = {rho: (tree["up"].rank, tree["down"].rank) for rho, tree in got.items()}
    assert ranks == {1.0: (2, 2), 1.5: (1, 3)}


def test_a_weight_of_rank_zero_is_not_adapted():
    """The inputs of `down` vary along two directions alone, and those of `up` along all."""
    params, x = mlp_params(), normal(7, N, D)
    mix = jnp.eye(2, 9)

    def model(params, x):
        return x @ params["up"], jnp.sin(x[:, :2] @ mix) @ params["down"]

    got = lora_jax.eva(model, start(model, params, x, rank=1), [(x,)])
    assert got["down"].rank == 2 and got["up"] is params["up"]
    jax.tree.map(np.testing.assert_array_equal, lora_jax.lora(model)(got, x), model(params, x))


# --- PEFT -----------------------------------------------------------------------------------------


def test_directions_ranks_and_scales_are_pefts():
    x = jnp.asarray(RECORDED["x"])
    adapted = start(recorded_model, recorded_params(), x, rank=3, alpha=6)
    got = lora_jax.eva(recorded_model, adapted, [(x,)])
    for name, rank in (("up", 2), ("down", 4)):
        want = RECORDED[f"eva/{name}.a"]
        assert got[name].rank == want.shape[1] == rank
        assert got[name].scale == RECORDED[f"eva/{name}.scale"]
        np.testing.assert_allclose(got[name].a, want, atol=1e-4)


# --- what it takes --------------------------------------------------------------------------------


def test_a_bfloat16_base_numpy_batches_and_flags():
    params, x = mlp_params(jnp.bfloat16), inputs_of_size(1, N, D)

    def model(params, x, train):
        return mlp(params, x.astype(jnp.bfloat16)) if train else None

    adapted = start(model, params, x, True)
    got = lora_jax.eva(model, adapted, iter([(np.asarray(x), True)]), **FLAT)
    assert got["up"].w is params["up"] and got["up"].a.dtype == jnp.float32
    assert_spans(got["up"].a, [x.astype(jnp.bfloat16).astype(jnp.float32)])


def test_trained_leaves_magnitudes_and_other_targets_are_left_alone():
    params, x = mlp_params(), inputs_of_size(1, N, D)
    adapted = start(mlp, params, x, train=["bias"], dora=True)
    got = lora_jax.eva(mlp, adapted, [(x,)], targets=["up"])
    assert got["down"] is adapted["down"] and got["bias"] is adapted["bias"]
    assert_spans(got["up"].a, [x])
    np.testing.assert_array_equal(got["up"].magnitude, adapted["up"].magnitude)
    np.testing.assert_allclose(lora_jax.lora(mlp)(got, x), mlp(params, x), atol=1e-5)


def test_a_rule_of_ones_own_is_observed():
    params, x = {"w": normal(1, D, 4)}, inputs_of_size(2, N, D)
    rules = {"toy_matmul": lora_jax.Rule(toy, {1: "io"})}

    def model(params, x):
        return matmul.bind(x, params["w"], factor=3.0)

    config = lora_jax.LoraConfig(rank=2)
    adapted = lora_jax.init(jax.random.key(0), params, config, model, x, rules=rules)
    assert_spans(lora_jax.eva(model, adapted, [(x,)], rules=rules, **FLAT)["w"].a, [x])


def looked_up(params, ids):
    return params["table"][ids] @ params["w"]


def test_what_has_no_inputs_is_an_error_that_names_it():
    params = {"table": normal(1, 11, D), "w": normal(2, D, 4)}
    ids = jnp.arange(7)
    adapted = start(looked_up, params, ids, targets=["table", "w"])
    with pytest.raises(TargetError, match=r"recorded no inputs for table.*targets="):
        lora_jax.eva(looked_up, adapted, [(ids,)])
    assert lora_jax.eva(looked_up, adapted, [(ids,)], targets=["w"])["table"] is adapted["table"]


CUT = {
    "outputs that do not depend": lambda p, x: jax.lax.stop_gradient(x @ p["w"]) + x[:, :4],
    "made dense": lambda p, x: x @ jnp.where(p["w"] > 0, p["w"], 0),
}


@pytest.mark.parametrize("name", CUT)
def test_inputs_that_cannot_be_seen_are_an_error(name):
    params, x = {"w": normal(1, D, 4)}, inputs_of_size(2, N, D)
    adapted = start(lambda p, x: x @ p["w"], params, x)
    with pytest.raises(TargetError, match="recorded no inputs for w"):
        lora_jax.eva(CUT[name], adapted, [(x,)])


@pytest.mark.parametrize("name", ["shard_map_tensor_parallel", "switch_chooses_a_weight_and_more"])
def test_inputs_seen_in_part_are_an_error(name):
    """Each device has a part of every input; or shapes decide whether a weight stays lazy."""
    case = next(case for case in CASES if case.name == name)
    fn, params, args = case.build(jnp.float32)
    adapted = start(fn, params, *args, targets=list(case.layouts))
    with pytest.raises(TargetError, match=r"recorded no inputs for (down|third)"):
        lora_jax.eva(fn, adapted, [args])


X = jnp.ones((N, D))
BAD = {
    "no batch": (ConfigError, {"batches": []}, "batches is empty"),
    "no tuple": (ConfigError, {"batches": [X]}, "must be a tuple"),
    "no iterable": (ConfigError, {"batches": 3}, "must be an iterable"),
    "a small rho": (ConfigError, {"rho": 0.5}, "rho must be"),
    "no passes": (ConfigError, {"passes": 0}, "passes must be"),
    "no outputs": (ConfigError, {"fn": lambda p, x: mlp(p, x).argmax(-1)}, "no floating array"),
    "no target": (TargetError, {"targets": ["nope"]}, "nearest paths"),
    "no adapters": (StructureError, {"params": mlp_params()}, "init"),
}


@functools.cache
def fresh():
    return start(mlp, mlp_params(), X)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_to_do(name):
    error, changes, message = BAD[name]
    given = {"fn": mlp, "params": fresh(), "batches": [(X,)]} | changes
    with pytest.raises(error, match=message):
        lora_jax.eva(given.pop("fn"), given.pop("params"), given.pop("batches"), **given)


def test_only_an_untrained_tree_with_values_can_be_initialized():
    params = mlp_params()
    abstract = jax.eval_shape(lambda: params)
    shapes = start(mlp, abstract, jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(StructureError, match=r"needs concrete arrays, .*: down, up"):
        lora_jax.eva(mlp, shapes, [(X,)])
    moved = jax.tree.map(lambda x: x + 1, fresh())
    with pytest.raises(StructureError, match="neither A nor B is zero in down, up"):
        lora_jax.eva(mlp, moved, [(X,)])
    _, adapters = lora_jax.split(fresh())
    with pytest.raises(StructureError, match="join"):
        lora_jax.eva(mlp, adapters, [(X,)])
