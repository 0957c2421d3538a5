"""Record adapters of mlx-lm 0.32 (mlx 0.32 on the CPU): the oracle of test_mlx.py.

    python -m tests.parity.mlx_lm.record_mlx [FOLDER ...]

writes `mlx.npz`:

    base/<name>                    weights of a small model, under torch's names
    <case>/adapters.safetensors    the files of an adapter, as bytes
    <case>/adapter_config.json
    <case>/merged/<name>           the weights that mlx-lm fuses it to

With folders it loads the adapters in them onto the same model instead, and writes the fused weights
to `merged.npz` in each: test_mlx.py's `check` compares.
"""

import json
import pathlib
import sys
import tempfile

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

FILE = pathlib.Path(__file__).parent / "mlx.npz"
LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 6, 10, 9
KEYS = ["attention.q", "up", "embed"]
CASES = {"lora": (2, 2.5, False), "last layers": (2, 20.0, False), "dora": (3, 0.5, True)}
CASES["dora embedding"] = CASES["dora"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, 8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up = Attention(), nn.Linear(WIDTH, HIDDEN, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Layer() for _ in range(LAYERS)]
        self.embed = nn.Embedding(VOCABULARY, WIDTH)


def build() -> nn.Module:
    mx.random.seed(0)
    model = Model()
    model.update(nn.utils.tree_map(lambda x: 0.4 * mx.random.normal(x.shape), model.parameters()))
    model.freeze()
    return model


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(model.parameters())}


def fused(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the weights with merged adapters."""
    plain = dict(tree_flatten(build().parameters()))
    found = {name: np.array(x) for name, x in plain.items()}
    for name, module in model.named_modules():
        if hasattr(module, "fuse"):
            found[f"{name}.weight"] = np.array(module.fuse().weight)
    return found


def record(case: str) -> dict[str, np.ndarray]:
    rank, scale, dora = CASES[case]
    model, layers = build(), 2 if case == "last layers" else -1
    keys = KEYS if case in ("lora", "dora embedding") else KEYS[:2]
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    moved = nn.utils.tree_map(
        lambda x: x + 0.3 * mx.random.normal(x.shape), model.trainable_parameters()
    )
    model.update(moved)
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": layers}
    settings["lora_parameters"] = parameters
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "adapters.safetensors"
        mx.save_safetensors(str(file), dict(tree_flatten(model.trainable_parameters())))
        tensors = file.read_bytes()
    config = json.dumps(settings, indent=4).encode()
    saved = {f"{case}/merged/{name}": x for name, x in fused(model).items()}
    saved[f"{case}/adapters.safetensors"] = np.frombuffer(tensors, np.uint8)
    return saved | {f"{case}/adapter_config.json": np.frombuffer(config, np.uint8)}


def main() -> None:
    for folder in sys.argv[1:]:
        model = load_adapters(build(), folder)
        np.savez(pathlib.Path(folder) / "merged.npz", **fused(model))
    if not sys.argv[1:]:
        saved = {f"base/{name}": x for name, x in weights(build()).items()}
        for case in CASES:
            saved |= record(case)
        np.savez_compressed(FILE, **saved)
        print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
