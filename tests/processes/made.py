"""A tiny Llama and adapters of it, the same in every process, and the way onto a global mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.tiny import tiny

CONFIG = lora.LoraConfig(rank=2, targets=".*(query|value|down)/kernel", dora=True)


def model_and_adapters(scan: bool = False) -> tuple[Pretrained, Any]:
    """Return a model and adapters that have an update, of numpy's arrays."""
    model = tiny(40, scan=scan)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = lora.init(jax.random.key(0), model.params, CONFIG, model.apply, ids, ids)
    _, adapters = lora.split(params)
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape).astype(x.dtype)
    is_node = lambda x: isinstance(x, lora.LoraWeight)
    fill = lambda node: dataclasses.replace(node, b=draw(node.b))
    filled = jax.tree.map(fill, adapters, is_leaf=is_node)
    model = dataclasses.replace(model, params=jax.device_get(model.params))
    return model, jax.device_get(filled)


def global_mesh() -> jax.sharding.Mesh:
    """Return a mesh of all devices of all processes: pairs of them along `tensor`."""
    shape = (jax.device_count() // 2, 2)
    return jax.make_mesh(shape, ("fsdp", "tensor"), (AxisType.Auto,) * 2)


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Place numpy's arrays on a mesh, sharded along the axes that it divides."""

    def one(x: Any) -> jax.Array:
        left = dict(mesh.shape)
        spec = []
        for size in np.shape(x):
            name = next((n for n, count in left.items() if size and size % count == 0), None)
            spec.append(name)
            left.pop(name, None)
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])

    return jax.tree.map(one, tree)
