"""`init`: what is chosen, how it starts, and what it refuses."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LayoutError, LoraConfig, LoraWeight, Override, TargetError, TrainedLeaf
from lora_jax.core.tree import adapted_nodes

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 16, name="embed")
        x = embed(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.Dense(24, name="up")(x)
        x = nn.Conv(16, (3,), name="conv")(nn.relu(x))
        return nn.Dense(16, name="head")(x), embed.attend(x)


IDS = jnp.arange(10).reshape(2, 5)
MODEL = Model()
PARAMS = jax.jit(MODEL.init)(KEY, IDS)["params"]


def apply(params, ids):
    return MODEL.apply({"params": params}, ids)


def init(fn=apply, params=PARAMS, **fields):
    return lora_jax.init(KEY, params, LoraConfig(**{"rank": 2, **fields}), fn, IDS)


def chosen(params):
    return {path: n.layout.axes for path, n in adapted_nodes(params).items()}


def test_all_linear_takes_every_contracted_weight_and_no_looked_up_one():
    assert chosen(init()) == {
        "attn/query/kernel": "ioo",
        "attn/key/kernel": "ioo",
        "attn/value/kernel": "ioo",
        "attn/out/kernel": "iio",
        "up/kernel": "io",
        "conv/kernel": "iio",
        "head/kernel": "io",
    }


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"targets": "attn/(query|value)/kernel"}, {"attn/query/kernel", "attn/value/kernel"}),
        ({"targets": ["query", "value/kernel"]}, {"attn/query/kernel", "attn/value/kernel"}),
        (
            {"targets": ["attn"], "exclude": ["out"]},
            {f"attn/{n}/kernel" for n in ("query", "key", "value")},
        ),
        ({"targets": lambda path, leaf: path == "up/kernel"}, {"up/kernel"}),
        ({"targets": "embed.*"}, {"embed/embedding"}),
        ({"targets": ["query/kernel", "attn/query/kernel", "attn/query"]}, {"attn/query/kernel"}),
        ({"exclude": "(attn|conv|up).*"}, {"head/kernel"}),
        ({"targets": ["up"], "train": ["head"]}, {"up/kernel", "head/kernel", "head/bias"}),
    ],
)
def test_targets(fields, paths):
    assert set(adapted_nodes(init(**fields))) == paths


def test_train_makes_leaves_trained_whole_and_all_linear_leaves_them_out():
    nodes = adapted_nodes(init(train=["head", "norm/scale"]))
    assert {path for path, n in nodes.items() if isinstance(n, TrainedLeaf)} == {
        "head/kernel",
        "head/bias",
        "norm/scale",
    }
    assert nodes["norm/scale"].w is PARAMS["norm"]["scale"]


def test_other_leaves_are_the_same_objects():
    params = init(targets=["up"])
    assert params["head"]["kernel"] is PARAMS["head"]["kernel"]
    assert params["up"]["kernel"].w is PARAMS["up"]["kernel"]


def test_start_is_kaiming_uniform_and_zero():
    w = {"kernel": jnp.zeros((400, 300))}
    node = lora_jax.init(KEY, w, LoraConfig(rank=64))["kernel"]
    bound = 1 / np.sqrt(400)
    assert np.abs(node.a).max() <= bound and np.abs(node.a).max() > 0.999 * bound
    np.testing.assert_allclose(np.var(node.a), bound**2 / 3, rtol=0.02)
    np.testing.assert_array_equal(node.b, 0)


def test_keys_are_folded_from_paths():
    """Another target changes no other's initial values, and no two weights get the same ones."""
    few, many = init(targets=["query"]), init()
    np.testing.assert_array_equal(
        few["attn"]["query"]["kernel"].a, many["attn"]["query"]["kernel"].a
    )
    assert (many["attn"]["query"]["kernel"].a != many["attn"]["key"]["kernel"].a).any()


def test_raw_and_typed_keys_start_alike():
    raw = lora_jax.init(jax.random.PRNGKey(0), PARAMS, LoraConfig(rank=2), apply, IDS)
    np.testing.assert_array_equal(raw["up"]["kernel"].a, init()["up"]["kernel"].a)


def test_rank_alpha_and_dtype_by_pattern():
    nodes = adapted_nodes(
        init(alpha=4, overrides={"up": {"rank": 5, "alpha": 1}}, dtype=jnp.bfloat16)
    )
    assert nodes["up/kernel"].rank == 5 and float(nodes["up/kernel"].scale) == np.float32(0.2)
    assert nodes["head/kernel"].rank == 2 and float(nodes["head/kernel"].scale) == 2.0
    assert (
        nodes["up/kernel"].a.dtype == jnp.bfloat16 and nodes["up/kernel"].scale.dtype == jnp.float32
    )


def test_abstract_params_allocate_nothing():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    ids = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)
    params = lora_jax.init(KEY, shapes, LoraConfig(rank=2), apply, ids)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    real = init()
    assert jax.tree.structure(params) == jax.tree.structure(real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )


def test_under_eval_shape_and_jit():
    config = LoraConfig(rank=2)
    shapes = jax.eval_shape(lambda p: lora_jax.init(KEY, p, config, apply, IDS), PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(init())
    jitted = jax.jit(lambda k, p: lora_jax.init(k, p, config, apply, IDS))(KEY, PARAMS)
    np.testing.assert_allclose(jitted["up"]["kernel"].a, init()["up"]["kernel"].a, rtol=1e-6)


def test_without_a_function_shapes_that_leave_no_choice():
    params = {
        "dense": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
        "conv": {"kernel": jnp.zeros((3, 3, 4, 5))},
        "embed": {"embedding": jnp.zeros((9, 4))},
    }
    assert chosen(lora_jax.init(KEY, params, LoraConfig(rank=2))) == {
        "dense/kernel": "io",
        "conv/kernel": "iiio",
    }


# --- refusals -------------------------------------------------------------------------------------


def refusal(error=TargetError, **fields):
    with pytest.raises(error) as caught:
        init(**fields)
    return str(caught.value)


def test_a_pattern_that_matches_nothing_also_when_others_do():
    message = refusal(targets=["query/kernel", "qeury/kernel"])
    assert "targets: 'qeury/kernel'" in message and "attn/query/kernel" in message
    assert "'query/kernel' matches" not in message
    assert "exclude: 'nothing'" in refusal(exclude=["nothing"])
    assert "train: 'haed'" in refusal(train=["haed"])
    message = refusal(overrides={"pu": Override(rank=1), "up": Override(rank=1)})
    assert "overrides: 'pu'" in message and "up/kernel" in message


def test_a_target_that_is_never_contracted():
    message = refusal(targets=["norm/scale", "up/kernel"])
    assert "norm/scale" in message and "`mul`" in message and "up/kernel" not in message


def test_a_module_without_linear_weights():
    assert "'norm'" in refusal(targets=["norm"])


def test_a_target_that_is_never_used():
    params = {**PARAMS, "spare": {"kernel": jnp.zeros((4, 4))}}
    assert "spare/kernel" in refusal(params=params, targets=["spare/kernel"])
    assert "used by nothing" in refusal(params=params, targets=["spare/kernel"])


def test_rank_above_the_size_lists_every_weight():
    message = refusal(rank=17, targets=["up", "head", "query"])
    assert all(path in message for path in ("up/kernel", "head/kernel", "attn/query/kernel"))
    assert "16" in message and "Override(rank=16)" in message


HEAD = {"up": {"kernel": jnp.ones((6, 12))}, "head": {"kernel": jnp.ones((12, 3))}}


@pytest.mark.parametrize(
    ("fields", "rank", "scale"),
    [
        ({}, 3, 1.0),
        ({"rank": 4, "alpha": 6}, 3, 2.0),
        ({"rank": 4, "overrides": {"head": {"alpha": 6}}}, 3, 2.0),
        ({"rank": 4, "init": "orthogonal"}, 2, 1.0),
        ({"rank": 4, "overrides": {"head": {"rank": 1}}}, 1, 1.0),
        ({"rank": 3}, 3, 1.0),
    ],
)
def test_all_linear_gives_a_small_head_the_rank_that_it_can_hold(fields, rank, scale):
    config = LoraConfig(**{"rank": 6, **fields})
    small = config.for_path("head/kernel").rank > 3
    said = pytest.warns(UserWarning, match=r"head/kernel: the weight \(12, 3\) can hold only")
    with said if small else contextlib.nullcontext():
        params = lora_jax.init(KEY, HEAD, config)
    assert params["head"]["kernel"].rank == rank and params["up"]["kernel"].rank == config.rank
    np.testing.assert_allclose(params["head"]["kernel"].scale, scale)


def test_a_named_head_and_a_rank_for_no_weight_are_still_errors():
    with pytest.raises(TargetError, match="head/kernel: rank 4 is above"):
        lora_jax.init(KEY, HEAD, LoraConfig(rank=4, targets=["head"]))
    with pytest.raises(TargetError, match="head/kernel: rank 4 is above"):
        lora_jax.init(KEY, HEAD, LoraConfig(rank=2, overrides={"head": {"rank": 4}}))
    with pytest.raises(TargetError, match="up/kernel: rank 7 is above"):
        lora_jax.init(KEY, HEAD, LoraConfig(rank=7))


def test_integer_weights():
    params = {"kernel": jnp.zeros((4, 3), jnp.int8)}
    with pytest.raises(TargetError, match="kernel: int8"):
        lora_jax.init(KEY, params, LoraConfig(rank=1, targets=["kernel"]))


def test_already_adapted():
    with pytest.raises(TargetError, match="already adapted: up/kernel"):
        lora_jax.init(KEY, init(targets=["up"]), LoraConfig(rank=2), apply, IDS)


def test_target_and_train_at_once():
    assert "up/kernel" in refusal(targets=["up"], train=["up/kernel"])


def test_a_shape_that_decides_nothing_without_a_function():
    params = {"attn": {"kernel": jnp.zeros((16, 4, 4))}, "mlp": {"kernel": jnp.zeros((5, 4, 4, 4))}}
    with pytest.raises(LayoutError) as caught:
        lora_jax.init(KEY, params, LoraConfig(rank=2))
    message = str(caught.value)
    assert "attn/kernel" in message and "mlp/kernel" in message and "Override(layout=" in message
    named = LoraConfig(rank=2, overrides={"attn": {"layout": "ioo"}, "mlp": {"layout": "bioo"}})
    assert chosen(lora_jax.init(KEY, params, named)) == {"attn/kernel": "ioo", "mlp/kernel": "bioo"}


def test_a_named_layout_that_does_not_fit():
    message = refusal(LayoutError, overrides={"up": {"layout": "bio"}})
    assert "up/kernel" in message and "'bio'" in message


def test_a_scanned_bias_is_no_target_and_a_second_use_leaves_the_layout():
    params = {"k": jnp.ones((4, 7, 7)), "bias": jnp.ones((4, 7))}

    def fn(params, x):
        def step(x, layer):
            return jnp.tanh(x @ layer["k"] + layer["bias"][None]), (layer["k"] ** 2).sum()

        return jax.lax.scan(step, x, params)

    x = jnp.ones((2, 7))
    assert chosen(lora_jax.init(KEY, params, LoraConfig(rank=2), fn, x)) == {"k": "bio"}
    with pytest.raises(TargetError, match=r"bias: never contracted .*`add`"):
        lora_jax.init(KEY, params, LoraConfig(rank=2, targets=["bias"]), fn, x)


def test_a_kernel_of_one_output_that_is_squeezed():
    params = {"w": jnp.ones((6, 1))}
    fn = lambda p, x: x @ p["w"][:, 0]
    assert chosen(lora_jax.init(KEY, params, LoraConfig(rank=1), fn, jnp.ones((3, 6)))) == {
        "w": "io"
    }


def test_excluding_every_target():
    assert "nothing would train" in refusal(targets=["up"], exclude=["up"])


def test_arguments_in_the_wrong_place():
    with pytest.raises(lora_jax.ConfigError, match="LoraConfig, got dict"):
        lora_jax.init(KEY, PARAMS, {"rank": 2})
    with pytest.raises(lora_jax.ConfigError, match="the function comes before"):
        lora_jax.init(KEY, PARAMS, LoraConfig(rank=2), IDS)


def test_nothing_to_adapt():
    with pytest.raises(TargetError, match="no leaf"):
        lora_jax.init(KEY, {"bias": jnp.zeros(3)}, LoraConfig(), lambda p, x: p["bias"] + x, 1.0)


def test_refusals_are_value_errors_and_leave_the_params_alone():
    with pytest.raises(ValueError):
        init(rank=1000)
    assert isinstance(init()["up"]["kernel"], LoraWeight)
