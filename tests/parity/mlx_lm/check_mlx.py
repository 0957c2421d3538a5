"""Load files that lora_jax writes with the real mlx-lm: the other half of the round trip.

    python -m tests.parity.mlx_lm.check_mlx PYTHON

with the Python of an environment that has mlx and mlx-lm (see `record_mlx.py`).
"""

import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

import lora_jax
from lora_jax import mlx
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import to_torch
from tests.parity.mlx_lm.test_mlx import PLAIN, STACKED, base
from tests.parity.peft.models import meaning

UP, QUERY = {"layout": "bio"}, {"layout": "bioo"}
CASES = {
    "plain": (PLAIN, lora_jax.LoraConfig(rank=2, alpha=3)),
    "embedding": (
        PLAIN,
        lora_jax.LoraConfig(
            rank=2, alpha=3, targets=["embedding"], overrides={"embed": {"layout": "io"}}
        ),
    ),
    "ranks": (
        PLAIN,
        lora_jax.LoraConfig(rank=2, alpha=3, overrides={"2/up": {"rank": 4, "alpha": 9}}),
    ),
    "dora": (PLAIN, lora_jax.LoraConfig(rank=2, targets=["up"], dora=True)),
    "dora embedding": (
        PLAIN,
        lora_jax.LoraConfig(
            rank=2,
            targets=["up/kernel", "embedding"],
            dora=True,
            overrides={"embed": {"layout": "oi"}},
        ),
    ),
    "stacked": (
        STACKED,
        lora_jax.LoraConfig(
            rank=2,
            alpha=5,
            targets=["up/kernel", "q/kernel"],
            overrides={"up/kernel": UP, "q/kernel": QUERY},
            layers=[1, 2],
        ),
    ),
}


def main() -> None:
    rng, wanted = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as root:
        for case, (naming, config) in CASES.items():
            tree = base(naming)
            adapters = lora_jax.split(lora_jax.init(jax.random.key(0), tree, config))[1]
            adapters = jax.tree_util.tree_map_with_path(
                lambda path, x: (
                    x if "scale" in str(path[-1]) else x + 0.3 * rng.normal(size=x.shape)
                ),
                adapters,
            )
            mlx.save(pathlib.Path(root) / case, adapters, naming, base=tree)
            merged = {path: np.asarray(x) for path, x in tree.items()}
            for path, node in adapted_nodes(adapters).items():
                merged[path] = meaning(node, merged[path])
            wanted[case] = to_torch(naming, merged)
        folders = [str(pathlib.Path(root) / case) for case in CASES]
        subprocess.run([sys.argv[1], "-m", "tests.parity.mlx_lm.record_mlx", *folders], check=True)
        for case, folder in zip(CASES, folders, strict=True):
            got = np.load(pathlib.Path(folder) / "merged.npz")
            apart = max(np.abs(got[name] - x).max() for name, x in wanted[case].items())
            print(f"{apart:.1e}  {case}")
            assert apart < 1e-5


if __name__ == "__main__":
    main()
