"""The model of `record_files.py` in JAX, and the namings of trees that hold it."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.weights import TrainedLeaf, TrainedRows
from lora_jax.files.naming import Entry, Naming, to_tree

RECORDED = np.load(pathlib.Path(__file__).parent / "recorded" / "files.npz")
BASE = {name[5:]: RECORDED[name] for name in RECORDED.files if name.startswith("base/")}
CASES = sorted({name.split("/")[0] for name in RECORDED.files if name.endswith(".safetensors")})
LAYERS = 3

ENTRIES = (
    Entry("model.emb.weight", "model/emb/embedding", "embedding"),
    Entry("{*m}.norm.weight", "{*m}/norm/scale"),
    Entry("{*m}.c_attn.weight", "{*m}/c_attn/kernel", "conv1d"),
    Entry("model.conv1.weight", "model/conv1/kernel", "conv", "o i w -> w i o"),
    Entry("model.conv2.weight", "model/conv2/kernel", "conv"),
    Entry("{*m}.weight", "{*m}/kernel", "linear"),
    Entry("{*m}.bias", "{*m}/bias"),
)
PLAIN = Naming(ENTRIES)
WIDTH, PARTS = 6, ("query", "key", "value")
# The layers in one array each.
STACKED = Naming(
    (
        *(
            Entry(f"model.layers.{{n}}.{name}.weight", f"model/layers/{name}/kernel", kind, axes)
            for name, kind, axes in (
                ("up", "linear", "o i -> n i o"),
                ("down", "linear", "o i -> n i o"),
                ("c_attn", "conv1d", "i o -> i n o"),
            )
        ),
        Entry("model.layers.{n}.norm.weight", "model/layers/norm/scale", axes="d -> n d"),
        *(
            Entry(f"model.layers.{{n}}.{name}.bias", f"model/layers/{name}/bias", axes="d -> n d")
            for name in ("up", "c_attn", "norm")
        ),
        *ENTRIES,
    )
)
# GPT-2's c_attn as three leaves, with heads of two.
SPLIT = Naming(
    (
        Entry(
            "{*m}.c_attn.weight",
            tuple(f"{{*m}}/{part}/kernel" for part in PARTS),
            "conv1d",
            "i (h d) -> i h d",
            {"d": 2},
        ),
        Entry("{*m}.c_attn.bias", tuple(f"{{*m}}/{part}/bias" for part in PARTS)),
        *ENTRIES,
    )
)
# Two modules that read different inputs cannot be joined in a model; their tensors can in a tree.
JOINED = Naming(
    (
        Entry(
            ("model.layers.0.up.weight", "model.layers.1.up.weight", "model.layers.2.up.weight"),
            "model/ups/kernel",
            "linear",
        ),
        *ENTRIES,
    )
)
NAMINGS = {"plain": PLAIN, "stacked": STACKED, "split": SPLIT, "joined": JOINED}


def shapes(which: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the leaves of a naming's tree, by path."""
    plain = {}
    for name, x in BASE.items():
        path = name.replace(".", "/")
        leaf = "embedding" if ".emb." in name else "scale" if ".norm." in name else "kernel"
        shape = x.shape
        if ".c_attn." not in name and path.endswith("/weight") and leaf == "kernel":
            shape = (*x.shape[2:], x.shape[1], x.shape[0])
        plain[path.replace("/weight", f"/{leaf}") if name.endswith("weight") else path] = shape
    plain["model/odd/weight/kernel"] = BASE["model.odd.weight.weight"].shape[::-1]
    plain["model/odd/weight/bias"] = BASE["model.odd.weight.bias"].shape
    plain = {k: v for k, v in plain.items() if "odd/kernel" not in k}
    found = {}
    for path, shape in plain.items():
        if which == "stacked" and "/layers/" in path:
            at = 1 if path.endswith("c_attn/kernel") else 0
            stacked = (*shape[:at], LAYERS, *shape[at:])
            found["model/layers/" + "/".join(path.split("/")[3:])] = stacked
        elif which == "split" and "/c_attn/" in path:
            for part in PARTS:
                one = (WIDTH, 3, 2) if path.endswith("kernel") else (WIDTH,)
                found[path.replace("c_attn", part)] = one
        elif which == "joined" and path.endswith("up/kernel"):
            found["model/ups/kernel"] = (WIDTH, 3 * shape[1])
        else:
            found[path] = shape
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in found.items()}


def base(which: str) -> dict[str, jax.Array]:
    """Return the recorded weights as a naming's tree."""
    return to_tree(NAMINGS[which], BASE, shapes(which))


def apply(p: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    """Compute the PyTorch model on the plain tree: ids `[batch, length]` -> `[batch, 4]`."""
    x = p["model/emb/embedding"][ids]
    for n in range(LAYERS):
        x = _layer({k.removeprefix(f"model/layers/{n}/"): v for k, v in p.items()}, x)
    x = jax.lax.conv_general_dilated(
        x, p["model/conv1/kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = x + p["model/conv1/bias"][None, None]
    x = x.transpose(0, 2, 1).reshape(len(ids), 2, 2, -1).transpose(0, 3, 2, 1)
    x = jax.lax.conv_general_dilated(
        x, p["model/conv2/kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x + p["model/conv2/bias"][None, None, None]
    x = jnp.tanh(jnp.tile(x.mean((1, 2)), (1, 2)))
    for name in ("lora_A", "weight", "base_layer"):
        x = jnp.tanh(_dense(p, f"model/odd/{name}", x))
    return _dense(p, "head", x)


def _dense(p: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}/kernel"] + jnp.expand_dims(p[f"{name}/bias"], range(x.ndim - 1))


def _layer(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * p["norm/scale"][None, None] + p["norm/bias"][None, None]
    query, key, value = jnp.split(_dense(p, "c_attn", normed), 3, -1)
    x = x + query * jax.nn.sigmoid(key) + value
    return x + jnp.tanh(_dense(p, "up", x)) @ p["down/kernel"]


def meaning(node: Any, w: np.ndarray) -> np.ndarray:
    """Return the weight that a node stands for, in NumPy: the oracle of merging."""
    if isinstance(node, TrainedLeaf):
        return np.where(np.asarray(node.scale) != 0, np.asarray(node.value), w)
    if isinstance(node, TrainedRows):
        replaced = np.array(w)
        np.moveaxis(replaced, node.axis, 0)[list(node.rows)] = np.asarray(node.value)
        return replaced
    axes = node.layout.axes
    names = {kind: [c for c, k in zip("abcde", axes, strict=False) if k == kind] for kind in "bio"}
    batch, ins, outs = ("".join(names[kind]) for kind in "bio")
    every = "abcde"[: len(axes)]
    factors = [np.asarray(x, np.float64) for x in (node.a, node.b, node.scale)]
    total = w + np.einsum(f"{batch}{ins}r,{batch}r{outs},{batch}->{every}", *factors)
    if node.magnitude is not None:
        norms = np.sqrt(np.einsum(f"{every},{every}->{batch}{outs}", total, total))
        gain = np.asarray(node.magnitude) / norms
        gain[factors[2] == 0] = 1
        total = np.einsum(f"{every},{batch}{outs}->{every}", total, gain)
    return total.astype(w.dtype)


def unpack(case: str, folder: pathlib.Path) -> pathlib.Path:
    """Write the two files that peft saved into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes(RECORDED[f"{case}/{file}"].tobytes())
    return folder
