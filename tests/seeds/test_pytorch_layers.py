"""The PyTorch implementation's README: `LoraLayer`, `Embedding`, `LinearWithLoRA`, their set-up."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Layout, LoraConfig, LoraWeight, layers
from lora_jax.layers import embedding, linear
from tests.programs import is_node
from tests.programs.jaxprs import weight_sized
from tests.seeds.helpers import KEY, close, factors, make, normal, same_bits, with_b

pytestmark = pytest.mark.usefixtures("quick_compile")

IDS = jnp.array([[2, 5, 2], [0, 9, 5]])
both_layers = pytest.mark.parametrize("module", [linear, embedding], ids=["linear", "embedding"])


def node_of(params):
    return params["embedding" if "embedding" in params else "kernel"]


def input_of(module):
    return IDS if module is embedding else normal(0, 3, 10)


# --- What a LoRA layer is -------------------------------------------------------------------------


def test_weight_decomposition():
    """W + α(BA)/r with B ∈ ℝᵈˣʳ, A ∈ ℝʳˣᵏ; here, as W is [k, d], the transposes."""
    d, k, r, alpha = 5, 7, 2, 6.0
    w, b, a = normal(0, d, k), normal(1, d, r), normal(2, r, k)
    node = LoraWeight(w.T, a.T, b.T, jnp.float32(alpha / r), layout=Layout("io"))
    close(lora_jax.merge(node).T, w + alpha * (np.asarray(b) @ a) / r)


def test_initialization_logic():
    """lora_A (in_features, rank), lora_B (rank, out_features), scaling = alpha / rank."""
    for module in (linear, embedding):
        node = node_of(make(module, 10, 8, rank=4, alpha=2))
        assert (node.a.shape, node.b.shape, float(node.scale)) == ((10, 4), (4, 8), 0.5)


@both_layers
def test_reset_parameters(module):
    """weight std=1/math.sqrt(self.vocab_size), lora_A std=0.02, zeros_(self.lora_B)."""
    w, a, b, _ = factors(node_of(make(module, 900, 64, rank=32)))
    np.testing.assert_allclose([w.std(), a.std()], [1 / 30, 0.02], rtol=0.02)
    assert abs(a).max() > 0.06 and not b.any()


@pytest.mark.parametrize(
    "layer, x",
    [(nn.Dense(6), jnp.ones((2, 3, 8))), (nn.Embed(10, 6), IDS)],
    ids=["linear", "embedding"],
)
def test_lora_layer_wraps_linear_and_embedding(layer, x):
    """LoraLayer(rank, alpha, base_layer, ...): "universal wrapper", no class of its own here."""
    config = LoraConfig(rank=2, alpha=4, targets=".*(kernel|embedding)", dropout=0.1)

    @jax.jit
    def start(key):
        variables = layer.init(key, x)
        params = lora_jax.init(key, variables, config, layer.apply, x)
        return params, layer.apply(variables, x)

    params, plain = start(KEY)
    run = jax.jit(lora_jax.lora(layer.apply, on_dense="error"))
    close(run(params, x), plain)
    params = with_b(params)
    close(run(params, x), run(lora_jax.merge(params), x))


@both_layers
def test_merging_and_unmerging_a_hundred_times(module):
    """ "Supports dynamic weight merging/unmerging": the base comes back to the bit."""
    params, x = with_b(make(module, 10, 8, rank=2, alpha=4)), input_of(module)
    base, adapters = lora_jax.split(params)
    first = lora_jax.merge(params)
    close(module.apply(first, x), module.apply(params, x))
    for _ in range(100):
        same_bits(lora_jax.merge(params), first)
        params = lora_jax.join(base, adapters)
    same_bits(lora_jax.split(params)[0], base)


def test_merging_twice_changes_nothing():
    """if self.merge_weights and not self.merged."""
    merged = lora_jax.merge(with_b(make(linear, 10, 8, rank=2, alpha=4)))
    same_bits(lora_jax.merge(merged), merged)


def test_dropout_on_the_branch():
    """ "Implements dropout for regularization": of the branch, with a key, and never without."""
    params = make(linear, 1000, 1, rank=1, alpha=1, bias=False, dropout=0.5)
    ones = dataclasses.replace(params["kernel"], a=jnp.ones((1000, 1)), b=jnp.ones((1, 1)))
    params, x = {"kernel": ones}, jnp.ones((1, 1000))
    base = float(np.asarray(ones.w).sum())
    apply = jax.jit(linear.apply)
    branch = lambda key: float(apply(params, x, key)[0, 0]) - base
    assert abs(branch(None) - 1000) < 0.01
    one, other = branch(jax.random.key(1)), branch(jax.random.key(2))
    assert one == branch(jax.random.key(1)) != other
    for kept in (one / 2, other / 2):  # a whole number of inputs, each of them doubled
        assert abs(kept - round(kept)) < 0.01 and abs(kept - 500) < 80
    module = layers.LinearWithLoRA(1000, 1, rank=1, bias=False, dropout=0.5)
    run = jax.jit(lambda rngs: module.apply({"params": params}, x, rngs=rngs)[0, 0] - base)
    assert abs(run({}) - 1000) < 0.01 < abs(run({"dropout": KEY}) - 1000)


# --- LinearWithLoRA -------------------------------------------------------------------------------


def test_linear_with_lora_forward():
    """result = x @ self.weight + ((x @ self.lora_A) @ self.lora_B) * self.scaling + self.bias."""
    params = with_b(make(linear, 10, 8, rank=2, alpha=4)) | {"bias": jnp.arange(8.0)}
    x = np.asarray(normal(0, 3, 10))
    w, a, b, scale = factors(params["kernel"])
    close(linear.apply(params, jnp.asarray(x)), x @ w + ((x @ a) @ b) * scale + np.arange(8.0))


@pytest.mark.parametrize("bias, names", [(True, {"kernel", "bias"}), (False, {"kernel"})])
def test_linear_with_lora_has_optional_bias(bias, names):
    """bias=True: "use bias", "optional bias terms"."""
    module, x = layers.LinearWithLoRA(fan_in=10, fan_out=8, rank=2, bias=bias), jnp.ones((3, 10))
    y, variables = jax.eval_shape(module.init_with_output, KEY, x)
    assert (set(variables["params"]), y.shape) == (names, (3, 8))


@both_layers
def test_rank_zero_is_a_plain_layer(module):
    """if self.rank > 0: without, there are no factors, and the weight itself is trained."""
    params, x = make(module, 10, 8, rank=0), input_of(module)
    assert not any(map(is_node, jax.tree.leaves(params, is_leaf=is_node)))
    loss = lambda p: (lambda y: ((y**2).sum(), y))(module.apply(p, x))
    grads, y = jax.jit(jax.grad(loss, has_aux=True))(params)
    w, x = np.asarray(node_of(params)), np.asarray(x)
    close(y, w[x] if module is embedding else x @ w)
    assert all(abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))


def test_matrices_are_multiplied_in_the_efficient_order():
    """(x @ self.lora_A) @ self.lora_B: "efficient matrix multiplication ordering"."""
    base, adapters = lora_jax.split(make(linear, 32, 24, rank=4, bias=False))
    x = jnp.ones((5, 32))
    loss = lambda adapters: (linear.apply(lora_jax.join(base, adapters), x) ** 2).sum()
    for fn in (loss, jax.grad(loss)):
        assert not weight_sized(jax.make_jaxpr(fn)(adapters).jaxpr, [(32, 24)])


# --- Embedding ------------------------------------------------------------------------------------


def test_embedding_forward():
    """x_emb = self.weight[x]; x_emb += (after_A @ self.lora_B) * self.scaling."""
    params = with_b(make(embedding, 10, 8, rank=2, alpha=4))
    w, a, b, scale = factors(params["embedding"])
    close(embedding.apply(params, IDS), w[IDS] + (a[IDS] @ b) * scale)


def test_embedding_padding_idx():
    """ "Supports padding indices": a row of zeros, and no gradient, before and after training."""
    ids = jnp.array([3, 1, 3])
    params = with_b(make(embedding, 10, 8, rank=2, padding_idx=3))
    moved = jax.tree.map(lambda x: x + 0.1, params)  # as from a file, its padding is not zero

    @jax.jit
    def run(params, moved):
        loss = lambda p, ids: (embedding.apply(p, ids, padding_idx=3) ** 2).sum()
        grads = [jax.grad(loss)(moved, i)["embedding"] for i in (ids, ids[1:2])]
        return embedding.apply(params, ids, padding_idx=3), *grads

    rows, grads, without = run(params, moved)
    np.testing.assert_array_equal(rows[0], 0)
    assert np.asarray(rows[1]).all()
    np.testing.assert_array_equal(grads.a[3], 0)
    assert abs(np.asarray(grads.a[1])).max() > 0
    close(grads.b, without.b)


@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_embedding_max_norm(norm_type):
    """max_norm, norm_type=2: "weight normalization options"."""
    params = with_b(make(embedding, 10, 8, rank=2, alpha=80))
    lookup = jax.jit(embedding.apply, static_argnames=("max_norm", "norm_type"))
    free = np.asarray(lookup(params, IDS))
    rows = np.asarray(lookup(params, IDS, max_norm=0.5, norm_type=norm_type))
    norms = [np.linalg.norm(x, norm_type, axis=-1, keepdims=True) for x in (free, rows)]
    assert norms[0].max() > 0.5
    close(norms[1], np.minimum(norms[0], 0.5))
    close(rows * norms[0], free * norms[1])  # shortened, not turned


def test_embedding_scale_grad_by_freq():
    """scale_grad_by_freq: 2 and 5 are twice in the batch, so their gradients are halved."""
    params = make(embedding, 10, 8, rank=0)
    total = lambda p, on: embedding.apply(p, IDS, scale_grad_by_freq=on).sum()
    plain, scaled = jax.jit(lambda p: [jax.grad(total)(p, on) for on in (False, True)])(params)
    counts = np.array([1, 1, 2, 1, 1, 2, 1, 1, 1, 1])[:, None]
    close(scaled["embedding"], np.asarray(plain["embedding"]) / counts)


def test_embedding_sparse():
    """ "Provides sparse gradient options": ids and rows, scattered into a donated table."""
    params = jax.tree.map(jnp.copy, make(embedding, 1000, 8, rank=0))  # to be donated
    table = np.asarray(params["embedding"]).copy()

    @jax.jit
    def rows_and_gradient(params):
        at = layers.looked_up(IDS)
        rows = layers.take_rows(params, at)
        loss = lambda rows: (embedding.apply(rows, IDS, at=at) ** 2).sum()
        return at, rows, jax.grad(loss)(rows)

    at, rows, grads = rows_and_gradient(params)
    assert at[:4].tolist() == [0, 2, 5, 9]
    assert grads["embedding"].shape == (IDS.size, 8)  # whatever the vocabulary

    rows = jax.tree.map(lambda x, g: x - 0.1 * g, rows, grads)
    pointer = params["embedding"].unsafe_buffer_pointer()
    after = jax.jit(layers.put_rows, donate_argnums=0)(params, at, rows)["embedding"]
    assert params["embedding"].is_deleted() and after.unsafe_buffer_pointer() == pointer
    counts = np.zeros((1000, 1))
    np.add.at(counts, np.asarray(IDS).ravel(), 1)
    close(after, table - 0.1 * 2 * counts * table)


# --- The usage guide ------------------------------------------------------------------------------


def test_basic_setup():
    """Embedding(vocab_size=50000, embed_dim=768, rank=16, alpha=32), LinearWithLoRA(768, …)."""
    table = layers.Embedding(vocab_size=50000, embed_dim=768, rank=16, alpha=32)
    layer = layers.LinearWithLoRA(fan_in=768, fan_out=768, rank=16, alpha=32, bias=True)
    shapes = jax.eval_shape(table.init, KEY, IDS), jax.eval_shape(layer.init, KEY, jnp.ones(768))
    counts = [lora_jax.count_params(s) for s in shapes]
    assert counts[0] == (16 * (50000 + 768), 50000 * 768 + 16 * (50000 + 768))
    assert counts[1] == (16 * 2 * 768, 768 * 768 + 768 + 16 * 2 * 768)


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embeds = layers.Embedding(10, 16, rank=4, alpha=32)(ids)
        return layers.LinearWithLoRA(16, 3, rank=3, alpha=32)(embeds)


def test_training_loop():
    """AdamW over both layers: loss = criterion(linear(embedding(input_ids)), labels)."""
    model, labels = Tagger(), IDS % 3
    params = jax.jit(model.init)(KEY, IDS)
    base, adapters = lora_jax.split(params)
    tx = lora_jax.freeze(optax.adamw(1e-2), params)

    def loss(params):
        logits = model.apply(params, IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (after, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=60)
        return after, losses, loss(after), loss(lora_jax.merge(after))

    after, losses, last, merged = run(params)
    assert last < 0.3 * losses[0]
    close(merged, last)
    same_bits(lora_jax.split(after)[0], base)
    assert jax.tree.structure(lora_jax.split(after)[1]) == jax.tree.structure(adapters)
