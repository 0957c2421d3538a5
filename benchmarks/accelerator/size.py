"""The sizes that the tables are measured at, and the model's random weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

#: The weights of a block, all of them adapted.
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a stack of decoder blocks and of its batch; adapters in float32."""

    layers: int
    width: int
    ffn: int
    heads: int
    batch: int
    time: int
    scanned_layers: int = 8
    repeats: int = 5  # timings, of which the median counts
    steps: int = 4  # steps of one timing
    dtype: str = "bfloat16"
    end: float | None = None  # of `time.monotonic`: nothing is compiled for a timing after it

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.time

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Return the shape of each adapted weight of one block."""
        square = dict.fromkeys("qkvo", (self.width, self.width))
        wide = dict.fromkeys(("gate", "up"), (self.width, self.ffn))
        return {**square, **wide, "down": (self.ffn, self.width)}

    def weights(self, layers: int | None = None) -> Any:
        """Draw the weights on the device: a list of blocks, or `layers` of them stacked."""
        if layers is not None:
            return self._block(jax.random.key(0), (layers,))
        return [self._block(key, ()) for key in jax.random.split(jax.random.key(0), self.layers)]

    def factors(self, rank: int, layers: int | None = None) -> Any:
        """Draw (A, B) of each weight, in a tree like `weights`; B is not zero."""
        if layers is not None:
            return self._pairs(jax.random.key(1), rank, (layers,))
        keys = jax.random.split(jax.random.key(1), self.layers)
        return [self._pairs(key, rank, ()) for key in keys]

    def activations(self) -> jax.Array:
        """Draw the input of the first block, `[batch, time, width]`."""
        shape = (self.batch, self.time, self.width)
        return jax.random.normal(jax.random.key(2), shape, self.dtype)

    def _block(self, key: jax.Array, stack: tuple[int, ...]) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(ADAPTED))
        shapes = self.kernels()
        drawn = {
            name: _draw(k, (*stack, *shapes[name]), self.dtype)
            for name, k in zip(ADAPTED, keys, strict=True)
        }
        norms = ("attn_norm", "mlp_norm")
        return drawn | {name: jnp.ones((*stack, self.width), self.dtype) for name in norms}

    def _pairs(self, key: jax.Array, rank: int, stack: tuple[int, ...]) -> dict[str, Any]:
        shapes = self.kernels()
        made = {}
        for name, k in zip(ADAPTED, jax.random.split(key, len(ADAPTED)), strict=True):
            rows, columns = shapes[name]
            first, second = jax.random.split(k)
            a = _draw(first, (*stack, rows, rank), "float32")
            made[name] = (a, 0.03 * _draw(second, (*stack, rank, columns), "float32"))
        return made


@jax.jit(static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Draw values whose variance keeps activations in range."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-2] ** -0.5, dtype)


SIZES = {
    "full": Size(layers=4, width=4096, ffn=11008, heads=32, batch=2, time=2048),
    "small": Size(
        layers=1,
        width=128,
        ffn=256,
        heads=4,
        batch=2,
        time=16,
        scanned_layers=1,
        repeats=2,
        steps=1,
    ),
}
