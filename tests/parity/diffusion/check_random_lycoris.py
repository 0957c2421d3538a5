"""Read LyCORIS' files of random configurations, and compare each weight with LyCORIS' own.

    python -m tests.parity.diffusion.check_random_lycoris PYTHON [COUNT [SEED [KIND ...]]]

with the Python of an environment that has torch and lycoris-lora, see `record_random_lycoris.py`.
"""

import collections
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from lora_jax import AdapterFileError, diffusion
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import Entry, Naming, to_torch
from tests.parity.peft.models import meaning

_KERNELS = {2: ("linear", ""), 3: ("conv", "o i w -> w i o"), 4: ("conv", ""), 5: ("conv", "")}
_KERNELS[5] = ("conv", "o i t h w -> t h w i o")


def naming_of(weights: dict[str, np.ndarray]) -> Naming:
    """Return a row for each tensor; kernels have their outputs last."""
    rows = []
    for name, x in weights.items():
        kind, axes = _KERNELS[x.ndim] if name.endswith("weight") and x.ndim > 1 else ("", "")
        rows.append(Entry(name, name.replace(".", "/"), kind, axes))
    return Naming(tuple(rows))


def tree_of(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the flat tree of these tensors, in float32."""
    turned = lambda x: x if x.ndim < 2 else np.moveaxis(x, (0, 1), (-1, -2))
    return {name.replace(".", "/"): turned(x).astype("float32") for name, x in weights.items()}


def differences(file: pathlib.Path, arrays: Any) -> dict[str, float]:
    """Return how far each merged weight is from LyCORIS', in units of the largest number."""
    part = lambda which: {
        name.removeprefix(f"{which}/"): arrays[name]
        for name in arrays.files
        if name.startswith(f"{which}/")
    }
    weights, want = part("base"), part("merged")
    naming, tree = naming_of(weights), tree_of(weights)
    adapters = diffusion.load(file, tree, naming, full_rank="train")
    nodes = adapted_nodes(adapters)
    merged = {path: meaning(node, tree[path]) for path, node in nodes.items()}
    got = to_torch(naming, tree | merged)
    lacking = [name for name in want if name.replace(".", "/") not in nodes]
    assert not lacking, f"no adapter of {lacking}"
    again = file.with_suffix(".again.safetensors")
    diffusion.save(again, adapters, naming, base=tree, layout="diffusers")
    nodes = adapted_nodes(diffusion.load(again, tree, naming, full_rank="train"))
    written = {path: meaning(node, tree[path]) for path, node in nodes.items()}
    back = to_torch(naming, tree | written)
    largest = lambda name: max(1.0, np.abs(want[name]).max())
    apart = lambda name, x: float(np.abs(x[name] - want[name]).max() / largest(name))
    return {name: max(apart(name, got), apart(name, back)) for name in want}


def main() -> None:
    python, *given = sys.argv[1:]
    count, seed = (*given[:2], *("200", "17")[len(given) :])
    worst: dict[str, float] = collections.defaultdict(float)
    seen, wrong = collections.Counter[str](), 0
    with tempfile.TemporaryDirectory() as root:
        command = [
            python,
            "-m",
            "tests.parity.diffusion.record_random_lycoris",
            root,
            count,
            seed,
            *given[2:],
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for path in sorted(pathlib.Path(root).glob("*.npz"), key=lambda x: int(x.stem)):
            notes = path.with_suffix(".txt").read_text().splitlines()
            kinds = {note.split(": ")[0]: note.split(") ")[1].split(" ")[0] for note in notes}
            seen.update(kinds.values())
            try:
                found = differences(path.with_suffix(".safetensors"), np.load(path))
            except (AdapterFileError, AssertionError) as error:
                wrong += 1
                print(f"{path.stem}: {error}\n  " + "\n  ".join(notes))
                continue
            for name, x in found.items():
                local = name.partition(".")[2].rpartition(".")[0]
                (kind,) = {
                    k for key, k in kinds.items() if key.endswith((local, local.replace(".", "_")))
                }
                worst[kind] = max(worst[kind], x)
                if not x < 2e-6:
                    wrong += 1
                    print(f"{path.stem}: {name} is {x:.1e} apart\n  " + "\n  ".join(notes))
    for kind, x in sorted(worst.items()):
        print(f"{x:.1e}  {kind} ({seen[kind]} modules)")
    print(f"{wrong} of {count} files differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
