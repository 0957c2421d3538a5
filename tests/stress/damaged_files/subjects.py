"""The subjects to damage: the files of each kind of adapter, and how to read them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import ml_dtypes
import numpy as np

import lora_jax
from lora_jax import loralib, mlx, peft
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.parity.peft import models
from tests.stress.damaged_files.edits import Files


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


BASE = {
    "up": {"kernel": values((7, 9)), "bias": values((9,))},
    "stack": values((3, 9, 5)).astype(ml_dtypes.bfloat16),
    "tokens": values((11, 4)),
}


@dataclass(frozen=True)
class Subject:
    """The files of one adapter, and the function that reads them."""

    name: str
    files: Files
    base: Any
    load: Callable[[Path], Any]  # of the directory the files are in


def read_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    return Subject(
        "native DoRA" if dora else "native",
        files,
        BASE,
        lambda folder: lora_jax.load(folder / "adapter.safetensors", BASE),
    )


def of_peft(case: str) -> Subject:
    base = _peft_base()
    with TemporaryDirectory() as folder:
        files = read_files(models.unpack(case, Path(folder) / case))
    return Subject(
        f"PEFT {case}", files, base, lambda folder: peft.load(folder, base, models.PLAIN)
    )


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
    return Subject("mlx-lm", files, base, lambda folder: mlx.load(folder, base, naming))


@functools.cache
def _peft_base() -> Any:
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
    return Subject(
        "loralib",
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


#: In turn: each format as often as the others, whatever the number of its files.
FORMATS = {
    "native": ["native", "native DoRA"],
    "PEFT": [f"PEFT {case}" for case in models.CASES],
    "mlx-lm": ["mlx-lm"],
    "loralib": ["loralib"],
}


def name(number: int, formats: Sequence[str]) -> str:
    """Return the subject's name for the mutation with this number."""
    turn, which = divmod(number, len(formats))
    subjects = FORMATS[formats[which]]
    return subjects[turn % len(subjects)]


@functools.cache
def subject(name: str) -> Subject:
    """Return the subject with a name in `FORMATS`."""
    if name.startswith("native"):
        return native(name.endswith("DoRA"))
    others = {"mlx-lm": of_mlx, "loralib": of_loralib}
    return others[name]() if name in others else of_peft(name.removeprefix("PEFT "))
