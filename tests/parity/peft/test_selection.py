"""What trains and the result of one step, against a recorded run of peft 0.21.2.

Layers 0 and 2 of three, biases of the adapted ones, two rows of the embedding; and LoRA+.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig, LoraWeight
from lora_jax.core.tree import adapted_nodes

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")
RECORDED = dict(np.load(Path(__file__).parent / "recorded" / "selection.npz"))
ROWS, LAYERS = (9, 2), (0, 2)
KINDS = {"lora_A": "a", "lora_B": "b", "base_layer": "value", "token_adapter": "value"}


def linear(name):
    weight, bias = (RECORDED[f"base.model.{name}.{field}"] for field in ("weight", "bias"))
    return {"kernel": weight.T, "bias": bias}


BASE = {
    "embed": {"embedding": RECORDED["base.model.embed.weight"]},
    "layers": {str(i): {n: linear(f"layers.{i}.{n}") for n in ("up", "down")} for i in range(3)},
    "head": linear("head"),
}


def model(params, ids):
    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"][None, None]

    x = params["embed"]["embedding"][ids]
    for layer in params["layers"].values():
        x = x + dense(layer["down"], jnp.tanh(dense(layer["up"], x)))
    return dense(params["head"], x)


def loss(params):
    return ((lora_jax.lora(model)(params, RECORDED["ids"]) - 1) ** 2).mean()


def recorded(prefix):
    """Return {(our path, our field): array in our orientation} of recorded parameters."""
    found = {}
    for name, x in RECORDED.items():
        if name.startswith(f"{prefix}.base_model"):
            path = name.partition(".model.model.")[2].split(".")
            kind = next(part for part in path if part in KINDS)
            module = "/".join(path[: path.index(kind)])
            leaf = {"lora_A": "kernel", "lora_B": "kernel", "base_layer": "bias"}.get(kind)
            field = KINDS[kind]
            found[f"{module}/{leaf or 'embedding'}", field] = x.T if field in "ab" else x
    return found


def init(**fields):
    """Adapt as PEFT does, with the recorded A and B."""
    fields = {"targets": ["up", "down"], "layers": LAYERS, "dtype": jnp.float64, **fields}
    config = LoraConfig(rank=2, alpha=3, **fields)
    start = recorded("start")
    base = jax.tree.map(jnp.asarray, BASE)
    params = lora_jax.init(jax.random.key(0), base, config, model, RECORDED["ids"])
    nodes, treedef = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, LoraWeight))
    paths = iter(path for path, n in adapted_nodes(params).items() if isinstance(n, LoraWeight))
    for i, node in enumerate(nodes):
        if isinstance(node, LoraWeight):
            path = next(paths)
            factors = {field: jnp.asarray(start[path, field]) for field in "ab"}
            nodes[i] = dataclasses.replace(node, **factors)
    return jax.tree.unflatten(treedef, nodes)


def trained(params):
    return {
        (path, field): getattr(node, field)
        for path, node in adapted_nodes(params).items()
        for field in ("a", "b", "value")
        if hasattr(node, field)
    }


def close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-11, atol=1e-11, err_msg=str(name))


def test_one_step():
    whole = init(bias="adapted", rows={"embed": ROWS})
    close(trained(whole), recorded("start"))  # the same parameters train
    value, grads = jax.jit(jax.value_and_grad(loss))(whole)
    np.testing.assert_allclose(value, RECORDED["loss"], rtol=1e-12)
    tx = lora_jax.freeze(optax.sgd(0.5), whole)
    updates, _ = tx.update(grads, tx.init(whole), whole)
    close(trained(optax.apply_updates(whole, updates)), recorded("step"))


def test_one_step_of_lora_plus():
    params = init()
    tx = lora_jax.lora_plus(0.5, params, ratio=4, optimizer=optax.sgd)
    updates, _ = tx.update(jax.jit(jax.grad(loss))(params), tx.init(params), params)
    close(trained(optax.apply_updates(params, updates)), recorded("plus"))
