"""Read what llama.cpp's converter makes of random PEFT adapters, and compare with reading those.

    LLAMA=llama_cpp_python-0.3.36/vendor/llama.cpp \
        python -m tests.parity.llama_cpp.check_random PYTHON [COUNT [SEED]]

with the Python of an environment that has torch, transformers and safetensors, see
`record_random.py`. A second file, which we write, must have the converter's tensors.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import types

import jax
import numpy as np

import lora_jax
from lora_jax import gguf, models, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.orbax.nested import nest
from tests.parity.llama_cpp import families

#: How far apart numbers are that were rounded once, relative to the largest.
ROUNDED = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2}


def model(family: str, layers: int):
    """Return a model of a family, as far as its names and its adaptable leaves go."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    layer = {(*path, "kernel"): leaf(*shape) for path, shape in families.leaves(family).items()}
    params = {f"layer_{i}": nest(layer) for i in range(layers)}
    params["embedding"] = {"embedding": leaf(families.VOCABULARY, families.WIDTH)}
    params["head"] = {"kernel": leaf(families.WIDTH, families.VOCABULARY)}
    settings = families.config(family) | {"tie_word_embeddings": False}
    return types.SimpleNamespace(settings=settings, naming=models.naming(family), params=params)


def differences(folder: pathlib.Path, said: dict) -> float:
    """Return how far the factors of both readings are apart, relative to the largest number."""
    ours = model(said["family"], said["layers"])
    tensors, _ = safetensors_file.read(folder / peft.TENSORS)
    wanted = adapted_nodes(
        peft.load(folder, ours.params, models.naming(said["family"], [*tensors]))
    )
    names = models.gguf_names(ours)
    loaded = gguf.load(folder / "adapter.gguf", ours.params, names)
    got = adapted_nodes(loaded)
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    gguf.save(folder / "again.gguf", loaded, names, base=ours.params)
    theirs, again = (gguf.read_file(folder / f"{x}.gguf") for x in ("adapter", "again"))
    assert theirs.tensors.keys() == again.tensors.keys() and theirs.alpha == again.alpha
    for name, x in theirs.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], x)
    worst = 0.0
    for path, node in wanted.items():
        np.testing.assert_allclose(got[path].scale, node.scale, rtol=1e-6)
        for x, y in ((node.a, got[path].a), (node.b, got[path].b)):
            x, y = (np.asarray(z, "float64") for z in (x, y))
            assert x.shape == y.shape, (path, x.shape, y.shape)
            worst = max(worst, np.abs(x - y).max() / np.abs(x).max())
    return worst


def main() -> None:
    python, *given = sys.argv[1:]
    count, seed = (*given, *("60", "17")[len(given) :])
    wrong, refused, read = 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        command = [python, "-m", "tests.parity.llama_cpp.record_random", root, count, seed]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for n in range(int(count)):
            folder = pathlib.Path(root) / str(n)
            said = json.loads((folder / "family.json").read_text())
            if "error" in said:
                refused += 1
                continue
            try:
                apart = differences(folder, said)
                problem = f"{apart:.1e} apart" if apart > ROUNDED[said["words"][1]] else None
            except (AssertionError, lora_jax.AdapterFileError, lora_jax.StructureError) as error:
                problem = f"{type(error).__name__}: {error}"
            read += 1
            if problem:
                wrong += 1
                print(f"{n}: {said}\n  {problem}")
    print(f"{read} read, {wrong} of them otherwise; {refused} that the converter refuses")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
