"""Load files that lora_jax writes with the real peft, on PyTorch models: the other half.

    python -m tests.parity.peft.check_files

needs torch, peft 0.21.2 and transformers besides lora_jax. For every case peft must load the files
with no warning, no missing and no unexpected key, hold exactly the file's tensors, and give the
outputs that JAX gives.
"""

import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft as hugging_face
import torch
from peft.utils.save_and_load import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import lora_jax
from lora_jax import peft
from lora_jax.core.patterns import lookup, select
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import to_torch, to_tree
from tests.parity.peft import models
from tests.parity.peft.recorded import record_files

TOLERANCE = 1e-5
CONFIGS: dict[str, Any] = {
    "all-linear": lora_jax.LoraConfig(rank=3, alpha=6),
    "few": lora_jax.LoraConfig(rank=2, alpha=5, targets=["up/kernel"]),
    "one layer": lora_jax.LoraConfig(rank=2, targets=r"model/layers/?1?/down/kernel"),
    "ranks": lora_jax.LoraConfig(
        rank=2, alpha=5, targets=["up/kernel", "down/kernel"], overrides={"up": {"rank": 4}}
    ),
    "rslora": lora_jax.LoraConfig(rank=3, alpha=5, scaling="rslora", targets=["down/kernel"]),
    "dora": lora_jax.LoraConfig(rank=3, dora=True),
    "biases": lora_jax.LoraConfig(rank=2, targets=["down/kernel"], bias="all"),
    "adapted biases": lora_jax.LoraConfig(rank=2, targets=["up/kernel"], bias="adapted"),
    "whole": lora_jax.LoraConfig(
        rank=2, targets=["down/kernel"], train=["head/kernel", "norm/scale"]
    ),
    "rows": lora_jax.LoraConfig(
        rank=2, targets=["down/kernel"], rows={"model/emb/embedding": [9, 2, 13]}
    ),
    "layers": lora_jax.LoraConfig(rank=2, targets=["up/kernel", "down/kernel"], layers=[0, 2]),
    "half": lora_jax.LoraConfig(rank=2, targets=["down/kernel"], dtype="bfloat16"),
}


def moved(adapters: Any, seed: int = 0) -> Any:
    """Return the tree with random trained values and unchanged scales."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, x: jax.Array) -> jax.Array:
        if jax.tree_util.keystr(path).endswith(".scale"):
            return x
        return x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(one, adapters)


def layouts(which: str) -> dict[str, str]:
    """Return the naming's layout of each adaptable leaf."""
    naming = models.NAMINGS[which]
    shapes = {path: x.shape for path, x in models.shapes(which).items()}
    places = naming.places(shapes)
    return {path: p.entry.layout for path, p in places.items() if p.entry.kind}


def adapted(which: str, config: lora_jax.LoraConfig) -> Any:
    """Return adapters of a configuration on one of the trees, with random values."""
    base, rows = models.base(which), config.rows
    every = {path: x for path, x in layouts(which).items() if path not in rows}
    if config.targets == "all-linear":
        config = dataclasses.replace(config, targets=list(every))
    chosen = select("targets", config.targets, base)
    ranks = {path: lookup(config.overrides, path) for path in chosen}
    overrides = {
        path: {"layout": every[path], "rank": found and found[1].rank}
        for path, found in ranks.items()
    }
    config = dataclasses.replace(config, overrides=overrides)
    params = lora_jax.init(jax.random.key(0), base, config)
    return moved(lora_jax.split(params)[1])


def checks() -> Iterator[tuple[str, Any, str, Any, dict[str, Any]]]:
    """Yield names, adapters, and how to save them: peft's cases, and cases of lora_jax."""
    for case in models.CASES:
        folder = models.unpack(case, pathlib.Path(tempfile.mkdtemp()))
        for which, naming in models.NAMINGS.items():
            adapters = peft.load(folder, models.base(which), naming)
            yield f"{case}, {which}", which, adapters, {}
        if case not in ("dora", "dora conv1d") and not any(
            word in case for word in ("bias", "save", "whole", "tokens")
        ):
            yield f"{case}, folded", which, adapters, {"fold": True}
    for name, config in CONFIGS.items():
        for which in models.NAMINGS:
            try:
                adapters = adapted(which, config)
            except lora_jax.TargetError:  # the tree has no such leaf
                continue
            yield f"lora_jax {name}, {which}", which, adapters, {"config": config}


def difference(which: str, adapters: Any, options: dict[str, Any]) -> float:
    """Return how far peft's outputs are from JAX's; raise if loading is not clean."""
    base, naming = models.base(which), models.NAMINGS[which]
    tree = {path: np.asarray(x) for path, x in base.items()}
    for path, node in adapted_nodes(adapters).items():
        tree[path] = models.meaning(node, tree[path])
    weights = to_torch(naming, tree)
    plain = to_tree(models.PLAIN, weights, models.shapes("plain"))
    ids = models.RECORDED["ids"]
    want = np.asarray(models.apply(plain, jnp.asarray(ids)))
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, adapters, naming, base=base, **options)
        got = loaded(record_files.build(), folder)(torch.from_numpy(ids))
    return float(np.abs(got.detach().numpy() - want).max())


def loaded(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Return peft's model with all tensors of the files in `folder`."""
    file = load_file(pathlib.Path(folder) / peft.TENSORS)
    model = hugging_face.PeftModel.from_pretrained(model, folder).eval()
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert file.keys() <= held.keys(), sorted(file.keys() - held.keys())
    more = [name for name in held.keys() - file.keys() if not name.endswith(".bias")]
    assert not more, more
    for name, tensor in file.items():
        assert torch.equal(held[name], tensor.to(held[name].dtype)), name
    # what from_pretrained does not return
    result = set_peft_model_state_dict(model, load_peft_weights(folder, "cpu"))
    assert not result.unexpected_keys, result.unexpected_keys
    missing = [name for name in result.missing_keys if "lora_" in name and ".default" in name]
    assert not missing, missing
    return model


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sets it right by itself
    warnings.filterwarnings("ignore", ".*have invalid shape")  # a bias of a module named lora_A
    worst, count = 0.0, 0
    for name, which, adapters, options in checks():
        count += 1
        apart = difference(which, adapters, options)
        print(f"{apart:.1e}  {name}", flush=True)
        rounded = name == "bfloat16, folded"  # scale · B, rounded to bfloat16
        worst = max(worst, 0.0 if rounded else apart)
        if apart > (1e-3 if rounded else TOLERANCE):
            raise SystemExit(f"{name}: outputs differ by {apart:.1e}")
    print(f"{count} adapters of lora_jax load in peft; outputs differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
