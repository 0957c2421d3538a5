"""First and second moments of the inputs of adapted weights over example batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.algebra import dense
from lora_jax.core.errors import ConfigError
from lora_jax.core.linalg import matmul
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.engine.context import Context
from lora_jax.engine.custom_rules import Rule
from lora_jax.engine.forms import PLAIN
from lora_jax.engine.lazy_weight import LazyWeight
from lora_jax.engine.probes import PRODUCTS, SUMS
from lora_jax.engine.program import FIRST, Argument, Program
from lora_jax.initializers.example_batches import Batch, sum_over_batches

Arrays = dict[str, jax.Array]  # by path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over all inputs x `[fan_in]` of one weight, separate for each stacked layer."""

    count: jax.Array  # [*batch]: the number of inputs
    total: jax.Array  # [*batch, fan_in]: Σx
    squares: jax.Array  # [*batch]: Σ‖x‖²

    def variance(self) -> jax.Array:
        """Return `Σ‖x − mean‖²`, `[*batch]`."""
        return self.squares - (self.total**2).sum(-1) / jnp.maximum(self.count, 1)

    def centered(self, products: jax.Array, sketch: jax.Array) -> jax.Array:
        """Return `Σ(x − mean)(x − mean)ᵀ·Ω` from `Σxxᵀ·Ω` and Ω, `[*batch, fan_in, columns]`."""
        of_mean = matmul(self.total[..., None, :], sketch)  # Σxᵀ·Ω
        count = jnp.maximum(self.count, 1)[..., None, None]
        return products - matmul(self.total[..., :, None], of_mean) / count


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of the adapted weights of `params` as `fn(params, *batch)` runs on batches."""

    fn: Callable
    params: Any
    batches: Sequence[Batch]
    rules: Mapping[str, Rule] | None = None

    def sums(self, nodes: Mapping[str, LoraWeight]) -> dict[str, Sums]:
        """Return the sums over the inputs of each of these weights, by path."""
        shapes = {path: (*matrix_shape(node), 3) for path, node in nodes.items()}

        def sums(params: Any, *batch: Any) -> dict[str, Sums]:
            ones = {path: jnp.ones(shape) for path, shape in shapes.items()}
            found = self._gradients(SUMS, ones, params, batch)
            # All entries of an input count alike, even where a convolution pads: see `observe`.
            return {
                path: Sums(x[..., 2].max(-1), x[..., 0], x[..., 1].sum(-1))
                for path, x in found.items()
            }

        return sum_over_batches(sums, (self.params,), self.batches)

    def products(self, sketches: Arrays) -> Arrays:
        """Return `Σxxᵀ·Ω` by path, for any Ω `[*batch, fan_in, columns]` by path."""

        def products(sketches: Arrays, params: Any, *batch: Any) -> Arrays:
            return self._gradients(PRODUCTS, sketches, params, batch)

        return sum_over_batches(products, (sketches, self.params), self.batches)

    def _gradients(self, probe: str, sketches: Arrays, params: Any, batch: Batch) -> Arrays:
        return jax.grad(lambda s: _objective(self.fn, probe, self.rules, s, params, batch))(
            sketches
        )


def matrix_shape(node: LoraWeight) -> tuple[int, ...]:
    """Return the shape `[*batch, fan_in]` of a weight."""
    return (*node.layout.select("b", node.shape), node.layout.fan_in(node.shape))


def _objective(
    fn: Callable,
    probe: str,
    rules: Mapping[str, Rule] | None,
    sketches: Arrays,
    params: Any,
    batch: Batch,
) -> jax.Array:
    """Return a number that depends on all floating outputs of `fn`; weights with sketches probe."""

    def enter(argument: Argument, path: str, leaf: Any) -> Any:
        if isinstance(leaf, TrainedLeaf):
            return dense(leaf)
        if isinstance(leaf, TrainedRows):
            return LazyWeight.of_rows(leaf, path)
        if is_quantized(leaf):
            return LazyWeight.of_quantized(leaf, path)
        if not isinstance(leaf, LoraWeight):
            return leaf
        if argument == FIRST and path in sketches:
            return _probing(leaf, path, sketches[path], probe)
        return LazyWeight.of(leaf, path)

    # The weight is dense where no rule covers its use; its inputs are not seen there.
    context = Context("allow", rules=rules, forms=PLAIN)
    outs = Program.of(fn, (params, *batch), {}, enter).evaluate(context)
    floats = [x for x in jax.tree.leaves(outs) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not floats:
        raise ConfigError("the function returns no floating array, through which its inputs show")
    return sum(x.sum().astype(jnp.float32) for x in floats)


def _probing(node: LoraWeight, path: str, sketch: jax.Array, probe: str) -> LazyWeight:
    """Return the weight with a sketch in place of A and B zero, so that only its base acts."""
    columns, shape = sketch.shape[-1], node.shape
    a = sketch.reshape(node.layout.a_shape(shape, columns))
    b = jnp.zeros(node.layout.b_shape(shape, columns), a.dtype)
    bare = LoraWeight(node.w, a, b, jnp.ones_like(node.scale), layout=node.layout)
    return dataclasses.replace(LazyWeight.of(bare, path), probe=probe)
