"""Load experts' parameters that lora_jax writes with real peft: outputs, names, no warnings.

    python -m tests.peft.check_experts

needs torch and peft 0.21.2. Adapters of peft's own and of lora_jax's `init`, folded
or not, with the base or without.
"""

import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

import lora_jax
from lora_jax import peft
from lora_jax.overlay import adapted_nodes
from tests.peft import experts, models, record_experts
from tests.peft.check_files import loaded, moved

TOLERANCE = 1e-5
CONFIGS = {
    "all": lora_jax.LoraConfig(rank=2, alpha=3, targets=["up", "down", "gate", "q"], dropout=0.1),
    "rslora": lora_jax.LoraConfig(rank=3, targets=["up"], scaling="rslora"),
    "one part": lora_jax.LoraConfig(rank=2, targets=["other/up", "other/down"]),
    "one layer": lora_jax.LoraConfig(rank=2, targets=["layers/down", "q"], layers=[1]),
    "ranks": lora_jax.LoraConfig(
        rank=2, targets=["layers/up", "q"], overrides={"up": {"rank": 3, "alpha": 7}}
    ),
}


def adapters() -> Iterator[tuple[str, Any, Any]]:
    """Names, overlays, and what they were made with."""
    base = experts.base()
    for case in experts.CASES:
        folder = experts.unpack(case, pathlib.Path(tempfile.mkdtemp()))
        yield case, peft.load(folder, base, experts.NAMING), peft.read_config(folder)
    for name, config in CONFIGS.items():
        x = experts.RECORDED["x"]
        params = lora_jax.init(jax.random.key(0), base, config, experts.apply, x)
        yield f"lora_jax {name}", moved(lora_jax.split(params)[1]), config


def difference(overlay: Any, **options: Any) -> float:
    """How far the outputs of torch with peft are from JAX's."""
    base, x = experts.base(), experts.RECORDED["x"]
    tree = {path: np.asarray(leaf) for path, leaf in base.items()}
    for path, node in adapted_nodes(overlay).items():
        tree[path] = models.meaning(node, tree[path])
    want = np.asarray(experts.apply(tree, x))
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, overlay, experts.NAMING, **options)
        model = loaded(record_experts.build(), folder)
        with torch.no_grad():
            got = model(torch.from_numpy(x)).numpy()
    return float(np.abs(got - want).max() / np.abs(want).max())


def main() -> None:
    warnings.simplefilter("error")
    # PEFT says so of patterns for parameters, and applies them
    warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module")
    worst, count, base = 0.0, 0, experts.base()
    for name, overlay, config in adapters():
        for options in ({"base": base, "config": config}, {"base": base, "fold": True}, {}):
            count += 1
            apart = difference(overlay, **options)
            print(f"{apart:.1e}  {name}, {', '.join(options) or 'adapters alone'}", flush=True)
            worst = max(worst, apart)
            assert apart < TOLERANCE, name
    print(f"{count} adapters of experts load in peft; outputs differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
