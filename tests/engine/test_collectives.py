"""A training step on a mesh communicates what the frozen model does, and the gradients once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from benchmarks import collectives, decoder
from benchmarks.collectives import MESHES, arguments, frozen_step, make_mesh
from benchmarks.hlo import count
from lora_jax import Forms, LoraConfig
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized, quantize_array
from lora_jax.core.sharding.quantized import field_specs
from tests.programs import is_node, normal, randomize

SIZE = decoder.Size(layers=2, width=16, heads=4, vocabulary=32, batch=8, time=4, rank=2)
BY_DEFAULT = {
    ("fsdp x tensor", "scan"),
    ("data x expert", "experts"),
}
CASES = [
    pytest.param(mesh, name, None, marks=() if (mesh, name) in BY_DEFAULT else pytest.mark.slow)
    for mesh in MESHES
    for name in collectives.programs(SIZE, mesh)
]
CASES += [pytest.param("fsdp x tensor", "scan", Forms.for_backend("gpu"), marks=pytest.mark.slow)]
#: Axes of at most four devices, because the model has four heads.
SIZES = {**MESHES, "tensor": {"tensor": 4}}


@pytest.fixture(autouse=True)
def as_the_decoder_is_written():
    with jax.numpy_rank_promotion("allow"):
        yield


def values(shapes):
    """Arrays of these shapes that lie where they say; the same on every mesh."""
    leaves, treedef = jax.tree.flatten(shapes)

    def one(seed, x):
        if x.dtype == jnp.int32:
            value = np.arange(np.prod(x.shape)).reshape(x.shape) * 7 % SIZE.vocabulary
        else:
            value = normal(seed, x.shape, x.dtype, 0.3)
        return jax.device_put(jnp.asarray(value, x.dtype), x.sharding)

    return jax.tree.unflatten(treedef, [one(i, x) for i, x in enumerate(leaves)])


def train(program, mesh, forms):
    """Two steps; returns the losses, dx, adapters and state, and the text of the step."""
    params, x, targets = values(arguments(program, SIZE, mesh))
    config = LoraConfig(rank=SIZE.rank, targets=program.targets)
    tree = lora_jax.init(jax.random.key(0), params, config, program.loss, x, targets)
    shardings = lora_jax.shardings(tree)
    base, adapters = lora_jax.split(jax.device_put(randomize(tree), shardings))
    step, tx = collectives.adapted_step(program, adapters, forms)
    state, results = tx.init(adapters), []
    compiled = jax.jit(step).lower(base, x, targets, adapters, state).compile()
    for _ in range(2):
        loss, dx, adapters, state = compiled(base, x, targets, adapters, state)
        results.append((loss, dx))
    _, by_rule = lora_jax.split(shardings)
    assert jax.tree.all(jax.tree.map(lambda s, x: s == x.sharding, by_rule, adapters))
    return results, adapters, state, compiled.as_text()


@functools.cache
def on_one_device(name):
    mesh_name = "expert" if name == "experts" else "data"
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    results, adapters, *_ = train(collectives.programs(SIZE, mesh_name)[name], mesh, None)
    return jax.device_get((results, adapters))


@pytest.mark.parametrize(("mesh_name", "name", "forms"), CASES)
def test_collectives(mesh_name, name, forms, quick_compile):
    """`forms` are None for those of the CPU, which differ from an accelerator's on one device."""
    program, mesh = collectives.programs(SIZE, mesh_name)[name], make_mesh_of(mesh_name)
    results, adapters, state, text = train(program, mesh, forms)
    params, x, targets = arguments(program, SIZE, mesh)
    frozen = jax.jit(frozen_step(program)).lower(params, x, targets).compile().as_text()
    more = {kind: n for kind, n in count(text).items() if n > count(frozen)[kind]}
    assert count(frozen) and set(more) <= {"all-reduce"}
    assert count(text)["all-reduce"] <= count(frozen)["all-reduce"] + 1
    want, adapters_want = on_one_device(name)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, (results, adapters), (want, adapters_want))
    check_moments(adapters, state)


def make_mesh_of(name):
    sizes = SIZES[name]
    return make_mesh(sizes, jax.devices()[: np.prod([*sizes.values()])])


def check_moments(adapters, state):
    """After the steps the moments lie as the factors do."""
    is_factors = lambda x: isinstance(x, dict) and "a" in x
    moments = [x for x in jax.tree.leaves(state, is_leaf=is_factors) if is_factors(x)]
    nodes = [x for x in jax.tree.leaves(adapters, is_leaf=is_node) if is_node(x)]
    for node, moment in zip(nodes * 2, moments, strict=True):
        assert (moment["a"].sharding, moment["b"].sharding) == (node.a.sharding, node.b.sharding)


def chained(layers, x):
    for w in layers:
        x = x + jnp.tanh(x @ w["up"]) @ w["down"]
    return x


def scanned(layers, x):
    step = lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None)
    return jax.lax.scan(step, x, jax.tree.map(lambda *w: jnp.stack(w), *layers))[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8_block", "nf4"])
@pytest.mark.parametrize(
    ("fn", "axes"), [(chained, {"t": 4}), (scanned, {"t": 4}), (scanned, {"d": 4})]
)
def test_a_quantized_base_communicates_no_more(fn, axes, kind, optimized):
    """Tensor parallel and FSDP; unrolled FSDP layers are gathered again in the backward pass."""
    (name,) = axes
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,))
    up, down = (P(None, "t"), P("t")) if name == "t" else (P("d"), P("d"))
    x = jax.device_put(
        normal(0, (8, 512), "float32"), NamedSharding(mesh, P("d") if name == "d" else P())
    )
    values = [
        {
            "up": normal(i, (512, 1024), "float32", 0.1),
            "down": normal(9 + i, (1024, 512), "float32"),
        }
        for i in range(2)
    ]
    quantized = jax.tree.map(lambda w: quantize_array(w, kind, 0), values)
    adapted = lora_jax.lora(fn, on_dense="error")
    loss = lambda a, base, x: (adapted(lora_jax.join(base, a), x) ** 2).mean()
    texts, outs = [], []
    for layers in (
        quantized,
        jax.tree.map(QuantizedWeight.dequantize, quantized, is_leaf=is_quantized),
    ):
        placed = [
            {"up": put(w["up"], mesh, up), "down": put(w["down"], mesh, down)} for w in layers
        ]
        base, adapters = lora_jax.split(
            lora_jax.init(jax.random.key(0), placed, LoraConfig(2), fn, x)
        )
        step = jax.jit(jax.value_and_grad(loss)).lower(adapters, base, x).compile()
        texts.append(step.as_text())
        outs.append(step(adapters, base, x))
    got, want = map(count, texts)
    assert want and all(n <= want[kind] for kind, n in got.items())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *outs)


def put(w, mesh, spec):
    """Place an array, or codes and scales, on a mesh."""
    if not is_quantized(w):
        return jax.device_put(w, NamedSharding(mesh, spec))
    specs = field_specs(w, spec, mesh.shape)
    fields = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in w.fields.items()}
    return dataclasses.replace(w, fields=fields)
