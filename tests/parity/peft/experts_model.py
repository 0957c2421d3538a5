"""The model of `record_experts.py` in JAX, with a tree and its naming."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.files.naming import Entry, Naming, to_tree

RECORDED = dict(np.load(pathlib.Path(__file__).parent / "recorded" / "experts.npz"))
CASES = sorted({name.split("/")[0] for name in RECORDED if name.endswith(".safetensors")})
EXPERTS, WIDTH, HIDDEN, LAYERS = 3, 4, 5, 2
NAMING = Naming(
    (
        Entry("router.weight", "router", "linear"),
        Entry("layers.{n}.q.weight", "q", "linear", "o i -> n i o"),
        Entry("layers.{n}.experts.up_proj", "layers/up", "experts", "e o i -> n e i o"),
        Entry("layers.{n}.experts.down_proj", "layers/down", "experts", "e o i -> e n i o"),
        Entry("other.gate_up", ("other/gate", "other/up"), "experts_transposed"),
        Entry("other.down", "other/down", "experts_transposed"),
        Entry("last.up", "last/up", "experts", "e o i -> e o i"),  # PEFT's "o" is the input
    )
)
SHAPES = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in {
        "router": (WIDTH, EXPERTS),
        "q": (LAYERS, WIDTH, WIDTH),
        "layers/up": (LAYERS, EXPERTS, WIDTH, HIDDEN),
        "layers/down": (EXPERTS, LAYERS, HIDDEN, WIDTH),
        "other/gate": (EXPERTS, WIDTH, HIDDEN),
        "other/up": (EXPERTS, WIDTH, HIDDEN),
        "other/down": (EXPERTS, HIDDEN, WIDTH),
        "last/up": (EXPERTS, WIDTH, HIDDEN),
    }.items()
}


def base() -> dict[str, jax.Array]:
    """Return the recorded weights as the naming's tree."""
    weights = {name[5:]: x for name, x in RECORDED.items() if name.startswith("base/")}
    return to_tree(NAMING, weights, SHAPES)


def apply(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """Compute what the PyTorch model computes: `[rows, width]` -> `[rows, width]`."""
    share = jax.nn.softmax(x @ p["router"]).T[..., None]  # [experts, rows, 1]
    every = lambda x: jnp.broadcast_to(x, (EXPERTS, *x.shape))
    for n in range(LAYERS):
        x = x + x @ p["q"][n]
        hidden = jnp.tanh(every(x) @ p["layers/up"][n])
        x = x + ((hidden @ p["layers/down"][:, n]) * share).sum(0)
    hidden = jnp.tanh(every(x) @ p["other/gate"]) * (every(x) @ p["other/up"])
    x = x + ((hidden @ p["other/down"]) * share).sum(0)
    return x + ((every(x) @ p["last/up"]) * share).sum(0)[:, :WIDTH]


def unpack(case: str, folder: pathlib.Path) -> pathlib.Path:
    """Write the two files that peft saved into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes(RECORDED[f"{case}/{file}"].tobytes())
    return folder
