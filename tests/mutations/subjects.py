"""What is damaged: the files of each kind of adapter, and how they are read."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import loralib, mlx, peft, tensorfile
from lora_jax.naming import Entry, Naming
from tests.cases import normal, randomize
from tests.mutations.edits import Files
from tests.peft import models

BASE = {
    "up": {"kernel": normal(1, (7, 9), jnp.float32), "bias": jnp.zeros(9)},
    "stack": normal(2, (3, 9, 5), jnp.bfloat16),
    "tokens": normal(3, (11, 4), jnp.float32),
}


@dataclass(frozen=True)
class Subject:
    """Files of one adapter, as they are written, and what reads them."""

    name: str
    files: Files
    base: Any
    load: Callable[[Path], Any]  # of the directory the files are in


def read_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def native(dora: bool) -> Subject:
    config = lora_jax.LoraConfig(
        rank=2,
        alpha=3,
        targets=["up/kernel", "stack"],
        train=["bias"],
        rows={"tokens": [1, 4]},
        dropout=0.1,
        dora=dora,
        overrides={"stack": {"layout": "bio"}, "tokens": {"layout": "io"}},
    )
    joined = randomize(lora_jax.init(jax.random.key(0), BASE, config))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        lora_jax.save(file, joined, {"note": ["mine", {"n": 1}]}, config=config)
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
    base = {"up": {"kernel": jnp.ones((4, 3))}, "down": {"kernel": jnp.ones((3, 5))}}
    naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    config = lora_jax.LoraConfig(rank=2, alpha=4)
    params = randomize(lora_jax.init(jax.random.key(0), base, config))
    with TemporaryDirectory() as folder:
        mlx.save(folder, params, naming)
        files = read_files(Path(folder))
    return Subject("mlx-lm", files, base, lambda folder: mlx.load(folder, base, naming))


@functools.cache
def _peft_base() -> Any:
    return jax.tree.map(np.asarray, models.base("plain"))


def of_loralib() -> Subject:
    """A `MergedLinear` with two of three parts, a bias, and a plain layer."""
    base = {
        "c_attn": {"kernel": np.ones((4, 6), np.float32), "bias": np.zeros(6, np.float32)},
        "up": {"kernel": np.ones((4, 3), np.float32)},
    }
    entries = Entry("{*m}.weight", "{*m}/kernel", "linear"), Entry("{*m}.bias", "{*m}/bias")
    shapes = {
        "c_attn.lora_A": (4, 4),
        "c_attn.lora_B": (4, 2),
        "c_attn.bias": (6,),
        "up.lora_A": (2, 4),
        "up.lora_B": (3, 2),
    }
    tensors = {
        name: np.asarray(normal(i, shape, jnp.float32))
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Subject(
        "loralib",
        {"lora.safetensors": tensorfile.encode(tensors)},
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
    """The subject of the mutation with this number."""
    turn, which = divmod(number, len(formats))
    subjects = FORMATS[formats[which]]
    return subjects[turn % len(subjects)]


@functools.cache
def subject(name: str) -> Subject:
    """The subject of a name in `FORMATS`."""
    if name.startswith("native"):
        return native(name.endswith("DoRA"))
    others = {"mlx-lm": of_mlx, "loralib": of_loralib}
    return others[name]() if name in others else of_peft(name.removeprefix("PEFT "))
