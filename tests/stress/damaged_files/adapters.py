"""Adapters of every format to damage, how to read them, and what may come of it."""

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import ml_dtypes
import numpy as np

import lora_jax
from lora_jax import diffusion, gguf, loralib, mlx, orbax, peft
from lora_jax.core.layout import Layout
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, check_fits
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.parity.diffusion import models as images
from tests.parity.diffusion import styles
from tests.parity.peft import models
from tests.stress.damaged_files.subject import Files, Subject, read_files, write_files


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


BASE = {
    "up": {"kernel": values((7, 9)), "bias": values((9,))},
    "stack": values((3, 9, 5)).astype(ml_dtypes.bfloat16),
    "tokens": values((11, 4)),
}


def lora_node(
    a: tuple[int, ...], b: tuple[int, ...], axes: str, magnitude: tuple[int, ...] | None = None
) -> LoraWeight:
    """Make a node of NumPy arrays, without compiling."""
    scale = np.full(a[: axes.count("b")], 1.5, np.float32)
    norms = None if magnitude is None else values(magnitude)
    layout = Layout(axes, ("dot_general",))
    return LoraWeight(None, values(a), values(b), scale, norms, layout=layout, dropout=0.1)


def native(dora: bool) -> Subject:
    one = np.float32(1)
    adapters = {
        "up": {
            "kernel": lora_node((7, 2), (2, 9), "io", (9,) if dora else None),
            "bias": TrainedLeaf(None, values((9,)), one),
        },
        "stack": lora_node((3, 9, 2), (3, 2, 5), "bio", (3, 5) if dora else None),
        "tokens": TrainedRows(None, values((2, 4)), one, rows=(1, 4), axis=0, layout=Layout("io")),
    }
    config = lora_jax.LoraConfig(rank=2, alpha=3, targets=["up/kernel", "stack"], dropout=0.1)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        note = {"note": ["mine", {"n": 1}]}
        lora_jax.save(file, adapters, note, base=BASE, config=config)
        files = read_files(Path(folder))
    return adapters_of(
        files, BASE, lambda folder: lora_jax.load(folder / "adapter.safetensors", BASE)
    )


def of_stack(path: str) -> Subject:
    """Return a stack of two adapters in one file or in a directory."""
    one = np.float32(1)
    stack = lora_jax.stack(
        [
            {"up": {"kernel": lora_node((7, 2), (2, 9), "io", (9,)), "bias": None}},
            {
                "up": {
                    "kernel": lora_node((7, 3), (3, 9), "io"),
                    "bias": TrainedLeaf(None, values((9,)), one),
                }
            },
        ],
        rank=4,
    )
    base = {"up": BASE["up"]}
    with TemporaryDirectory() as folder:
        place = Path(folder) / path
        lora_jax.save(place, stack, {"note": 1}, base=base, names=["first", "second"])
        files = read_files(place if place.is_dir() else Path(folder))
    at = lambda folder: folder / path if path.endswith(".safetensors") else folder
    return adapters_of(files, base, lambda folder: lora_jax.load(at(folder), base))


def of_peft(case: str) -> Subject:
    base = peft_base()
    with TemporaryDirectory() as folder:
        files = read_files(models.unpack(case, Path(folder) / case))
    return adapters_of(files, base, lambda folder: peft.load(folder, base, models.PLAIN))


def of_mlx() -> Subject:
    base = {"up": {"kernel": values((4, 3))}, "down": {"kernel": values((3, 5))}}
    naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    adapters = {
        "up": {"kernel": lora_node((4, 2), (2, 3), "io")},
        "down": {"kernel": lora_node((3, 2), (2, 5), "io")},
    }
    with TemporaryDirectory() as folder:
        mlx.save(folder, adapters, naming, base=base)
        files = read_files(Path(folder))
    return adapters_of(files, base, lambda folder: mlx.load(folder, base, naming))


def of_gguf() -> Subject:
    """Return an adapter of a linear layer, an embedding and experts, in one GGUF file."""
    base = {"value": values((4, 3)), "tokens": values((11, 4)), "experts": values((2, 4, 3))}
    rows = (
        Entry("blk.0.attn_v.weight", "value", "linear"),
        Entry("token_embd.weight", "tokens", "embedding"),
        Entry("blk.0.ffn_up_exps.weight", "experts", "experts"),
    )
    names = gguf.Names("llama", Naming(rows))
    adapters = {
        "value": lora_node((4, 2), (2, 3), "io"),
        "tokens": lora_node((11, 3), (3, 4), "io"),
        "experts": lora_node((2, 4, 2), (2, 2, 3), "bio"),
    }
    with TemporaryDirectory() as folder:
        gguf.save(Path(folder) / "adapter.gguf", adapters, names, base=base, base_model="mine")
        files = read_files(Path(folder))
    return adapters_of(files, base, lambda folder: gguf.load(folder / "adapter.gguf", base, names))


def of_orbax(state: bool = False) -> Subject:
    """Return a checkpoint of openpi: its parameters, or a step with an optimizer's state."""
    import orbax.checkpoint as ocp

    layer = {"q_einsum": {"w": values((2, 3, 4, 2)), "lora_a": values((2, 3, 4, 1))}}
    layer["q_einsum"]["lora_b"] = values((2, 3, 1, 2))
    params = {"params": {"layers": {"attn": layer}, "norm": values((4,))}}
    params |= {"opt_state": {"count": np.int32(3)}} if state else {}
    place = "3/items" if state else "params"
    with TemporaryDirectory() as folder:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "run" / place, params)
        files = read_files(Path(folder) / "run")
    base = {"layers": {"attn": {"q_einsum": {"w": layer["q_einsum"]["w"]}}}, "norm": values((4,))}

    def load(folder: Path) -> Any:
        return lora_jax.split(orbax.load(folder, "openpi"))[1]

    return adapters_of(files, base, load)


def of_images(case: str) -> Subject:
    """Return a LoRA file of an image generator that a library wrote."""
    name, recorded = "lora.safetensors", images.RECORDED
    if case in styles.STYLES:
        base, naming, recorded = styles.zeros(case), styles.NAMING, styles.RECORDED
    elif case == "flux":
        base, naming = jax.tree.map(np.asarray, images.flux_base()), images.FLUX
    else:
        base, naming = jax.tree.map(np.asarray, images.base()), images.NAMING
    return adapters_of(
        {name: recorded[f"{case}/file"].tobytes()},
        base,
        lambda folder: diffusion.load(folder / name, base, naming, full_rank="train"),
    )


@functools.cache
def peft_base() -> Any:
    return jax.tree.map(np.asarray, models.base("plain"))


def of_loralib() -> Subject:
    """Return a `MergedLinear` with two of three parts, a bias, and a plain layer."""
    base = {
        "c_attn": {"kernel": values((4, 6)), "bias": values((6,))},
        "up": {"kernel": values((4, 3))},
    }
    entries = Entry("{*m}.weight", "{*m}/kernel", "linear"), Entry("{*m}.bias", "{*m}/bias")
    shapes = {
        "c_attn.lora_A": (4, 4),
        "c_attn.lora_B": (4, 2),
        "c_attn.bias": (6,),
        "up.lora_A": (2, 4),
        "up.lora_B": (3, 2),
    }
    tensors = {name: values(shape) for name, shape in shapes.items()}
    return adapters_of(
        {"lora.safetensors": safetensors_file.encode(tensors)},
        base,
        lambda folder: loralib.load(
            folder / "lora.safetensors",
            base,
            Naming(entries),
            alpha=2,
            enabled={"c_attn": [True, False, True]},
        ),
    )


def adapters_of(files: Files, base: Any, load: Callable[[Path], Any]) -> Subject:
    """Return the subject: what is loaded must be finite adapters that fit the base."""
    original: list[Any] = []

    def judge(adapters: Any, folder: Path) -> tuple[str, str]:
        if not original:
            with TemporaryDirectory() as place:
                write_files(Path(place), files)
                original.append(load(Path(place)))
        return _judge(adapters, base, original[0])

    return Subject(files, load, judge)


def _judge(adapters: Any, base: Any, want: Any) -> tuple[str, str]:
    bases = flatten_with_paths(base)[0]
    nodes = adapted_nodes(adapters)
    problems = [
        line
        for path, node in nodes.items()
        for line in (
            check_fits(path, node, bases[path], stacked=node.slot is not None)
            if path in bases
            else [f"{path}: unknown"]
        )
    ]
    problems += [f"{path}: {node}" for path, node in nodes.items() if not _is_sane(node)]
    leaves = [np.asarray(x) for x in jax.tree.leaves(adapters)]
    if not nodes:
        problems.append("an adapter of nothing")
    if not all(np.isfinite(x.astype(np.float32)).all() for x in leaves):
        problems.append("values that are not finite")
    if problems:
        return "loads what it should not", "; ".join(problems)
    same = jax.tree.structure(adapters) == jax.tree.structure(want) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves, jax.tree.leaves(want), strict=True)
    )
    return ("loads, equal" if same else "loads, other finite values that fit"), ""


def _is_sane(node: Adapted) -> bool:
    """Return whether the static fields have the types and values that the package relies on."""
    if isinstance(node, TrainedLeaf):
        return True
    uses = isinstance(node.layout.uses, tuple) and all(type(use) is str for use in node.layout.uses)
    if isinstance(node, TrainedRows):
        rows = isinstance(node.rows, tuple) and all(type(row) is int for row in node.rows)
        axis = type(node.axis) is int and node.axis in node.layout.positions("io")
        return uses and rows and axis and len(set(node.rows)) == len(node.rows)
    return uses and type(node.dropout) is float and 0 <= node.dropout < 1
