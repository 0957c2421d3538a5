"""Random adapters, and how to compare them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax.core.tree import adapted_nodes
from tests.parity.peft import models

BASE = models.base("plain")
SHAPES = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in BASE.items()}
PREFIX = "base_model.model."
UP = "model/layers/1/up/kernel"


def adapted(config, which="plain"):
    """Return random adapters with the configuration's scales, without compiling a program."""
    rng = np.random.default_rng(0)
    nodes = lora_jax.init(jax.random.key(0), models.shapes(which), config)

    def one(path, node):
        scale = config.for_path(path).scale
        made = {"scale": np.full(node.scale.shape, scale, "f4")}
        for field in ("a", "b", "magnitude", "value"):
            x = getattr(node, field, None)
            made[field] = x and jnp.asarray(rng.normal(size=x.shape), x.dtype)
        fields = {f.name for f in dataclasses.fields(node)}
        made = {field: x for field, x in made.items() if field in fields}
        return dataclasses.replace(node, w=None, **made)

    return {path: one(path, node) for path, node in adapted_nodes(nodes).items()}


def equal(some, others):
    assert adapted_nodes(some).keys() == adapted_nodes(others).keys()
    jax.tree.map(np.testing.assert_array_equal, some, others)
