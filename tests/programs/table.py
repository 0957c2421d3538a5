"""One table of programs; every property of the engine is tested over it. A new program is a row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax

KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, its parameters (the first argument) and what the library must infer about it.

    `build(dtype)` returns (fn, params, args). `layouts` are the targets and what must be inferred;
    `reverse` is False where JAX itself has no reverse mode for the program, `differentiable` False
    where it has none at all; `dense` names the primitive where the weight must be materialized;
    `small` says that it is so small that W + A·B costs less than the branch;
    `vmappable` is False where JAX itself cannot map the program over its arguments alone.
    """

    name: str
    build: Callable[[Any], tuple[Callable, Any, tuple]]
    layouts: dict[str, str]
    reverse: bool = True
    differentiable: bool = True
    dense: str | None = None
    shapes_collide: bool = False
    small: bool = False
    vmappable: bool = True

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


CASES: list[Case] = []
DENSE_CASES: list[Case] = []  # those in which the weight must be materialized


def case(**fields: Any) -> Callable[[Callable], Callable]:
    """Put a program into its table under its function's name."""

    def register(build: Callable) -> Callable:
        table = DENSE_CASES if "dense" in fields else CASES
        table.append(Case(build.__name__, build, **fields))
        return build

    return register


#: One program of every kind.
FEW = {
    "attention",
    "concatenated_qkv",
    "conv_2d_strided",
    "custom_jvp",
    "embed_lookup",
    "flax_scan_remat",
    "ragged_experts",
    "reshaped_and_scaled",
    "shard_map_tensor_parallel",
    "tied_attend",
}


def a_few(cases: list[Case]) -> list[Any]:
    """Return the cases as test parameters: one of every kind, and the others marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(case, marks=[] if case.name in FEW else slow) for case in cases]


# Fixtures come from numpy (and `device_put`, as `asarray` compiles): for programs this small,
# compiling what draws them was most of the suite's time.
def normal(seed: int, shape: tuple[int, ...], dtype: Any, size: float = 1.0) -> jax.Array:
    """Return normal numbers times `size`."""
    drawn = np.random.default_rng(seed).standard_normal(shape) * size
    return jax.device_put(drawn.astype(jnp.dtype(dtype)))


def linen(module: nn.Module, *args: Any) -> tuple[Callable, Any, tuple]:
    """Return fn(params, *args) of a Flax Linen module, with all parameters random."""
    shapes = jax.eval_shape(module.init, KEY, *args)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    leaves = [normal(i, x.shape, x.dtype, 1 / (1 + x.ndim)) for i, x in enumerate(leaves)]

    def fn(params: Any, *args: Any) -> Any:
        return module.apply({"params": params}, *args)

    return fn, jax.tree.unflatten(treedef, leaves), args


def adapt(
    built: tuple[Callable, Any, tuple], layouts: dict[str, str], dtype: Any, **options: Any
) -> Any:
    """Return the adapted parameters of a case, with A and B random and the scale 1.5."""
    fn, params, args = built
    rank = options.pop("rank", 2)
    config = lora_jax.LoraConfig(
        rank=rank, alpha=1.5 * rank, targets=list(layouts), dtype=dtype, **options
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    nodes = lora_jax.init(jax.random.key(1), shapes, config, fn, *args)
    return jax.tree.map(fill, nodes, params, is_leaf=is_node)


def fill(node: Any, w: jax.Array) -> Any:
    """Fill an adapted weight of shapes with numbers."""
    if not is_node(node):
        return w
    m = node.magnitude
    return dataclasses.replace(
        node,
        w=w,
        a=normal(2, node.a.shape, node.a.dtype, 0.2),
        b=normal(3, node.b.shape, node.b.dtype),
        scale=jnp.full(node.scale.shape, 1.5, node.scale.dtype),
        magnitude=None if m is None else 1 + abs(normal(4, m.shape, m.dtype)),
    )


def randomize(params: Any) -> Any:
    """Make the factors that start as zero random, and the magnitudes."""

    def one(node: Any) -> Any:
        if not isinstance(node, lora_jax.LoraWeight):
            return node
        zero = "a" if node.layout.uses == ("gather",) else "b"  # which factor starts as zero
        factor = getattr(node, zero)
        m = node.magnitude
        m = None if m is None else m * (1 + normal(4, m.shape, m.dtype, 0.3))
        return dataclasses.replace(
            node, **{zero: normal(3, factor.shape, factor.dtype)}, magnitude=m
        )

    return jax.tree.map(one, params, is_leaf=is_node)


def is_node(x: Any) -> bool:
    return isinstance(x, lora_jax.LoraWeight | lora_jax.TrainedLeaf)


def merged(params: Any) -> Any:
    """Return the oracle: W + scale·A·B, or m·V/‖V‖; of the library only the letters are used."""

    def one(node: Any) -> Any:
        if not is_node(node):
            return node
        if isinstance(node, lora_jax.TrainedLeaf):
            return node.value.astype(node.w.dtype)
        axes = node.layout.axes
        order = [i for kind in "bio" for i, letter in enumerate(axes) if letter == kind]
        grouped = [node.w.shape[i] for i in order]
        count = {kind: axes.count(kind) for kind in "bio"}
        stack = grouped[: count["b"]]
        r = node.a.shape[-1]
        a = node.a.reshape(*stack, -1, r)
        b = node.b.reshape(*stack, r, -1)
        update = (a @ b) * node.scale[..., None, None]
        update = jnp.transpose(update.reshape(grouped), [order.index(i) for i in range(len(order))])
        total = node.w.astype(update.dtype) + update
        if node.magnitude is not None:  # in the weight's order of axes, of size one where it sums
            ins = tuple(i for i, letter in enumerate(axes) if letter == "i")
            norms = jax.lax.stop_gradient(jnp.sqrt((total**2).sum(ins, keepdims=True)))
            batch_and_out = [i for i in order if i not in ins]
            m = node.magnitude.transpose([batch_and_out.index(i) for i in sorted(batch_and_out)])
            total = total * m.reshape(norms.shape) / norms
        return total.astype(node.w.dtype)

    return jax.tree.map(one, params, is_leaf=is_node)
