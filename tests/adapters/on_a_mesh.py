"""Weights that lie on a mesh, and where their adapters are to lie."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import LoraConfig
from tests.programs import normal

KEY = jax.random.key(0)
STACKED = {"stack": {"layout": "bio"}, "heads": {"layout": "ioo"}}


def make_mesh(kind=AxisType.Auto, **axes):
    axes = axes or {"fsdp": 2, "tensor": 2, "expert": 2}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


MESH = make_mesh()


def put(shape, *entries, mesh=MESH, seed=1, dtype=jnp.float32):
    return jax.device_put(normal(seed, shape, dtype), NamedSharding(mesh, P(*entries)))


def specs(tree):
    """The specification of each array, with an entry per axis."""
    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(lambda s, x: (*s.spec, *[None] * (x.ndim - len(s.spec))), shardings, tree)


def base():
    return {
        "up": put((8, 16), "fsdp", "tensor"),
        "down": put((16, 8), "tensor", "fsdp"),
        "both": put((8, 16), None, ("fsdp", "tensor")),
        "heads": put((8, 4, 4), "fsdp", "tensor"),
        "stack": put((4, 8, 16), "expert", "fsdp", "tensor"),
        "bias": put((16,), ("fsdp", "tensor")),
        "norm": put((8,)),
    }


CONFIG = LoraConfig(rank=2, dora=True, overrides=STACKED, bias="all", train=["norm"])
#: Per weight: of A, B, and the magnitude; worked out by hand.
WANTED = {
    "up": ((None, None), (None, "tensor"), ("tensor",)),
    "down": (("tensor", None), (None, None), (None,)),
    "both": ((None, None), (None, "tensor"), ("tensor",)),
    "heads": ((None, None), (None, "tensor", None), ("tensor", None)),
    "stack": (("expert", None, None), ("expert", None, "tensor"), ("expert", "tensor")),
}


def check(tree):
    got = specs(tree)
    for name, (a, b, magnitude) in WANTED.items():
        assert (got[name].a, got[name].b, got[name].magnitude) == (a, b, magnitude), name
    assert got["stack"].scale == ("expert",) and got["up"].scale == ()
    assert got["bias"].value == (("fsdp", "tensor"),) and got["norm"].value == (None,)
    shardings = [x.sharding for x in jax.tree.leaves(tree)]
    assert all(isinstance(x, NamedSharding) and x.mesh == MESH for x in shardings)


def values(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def product(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]
