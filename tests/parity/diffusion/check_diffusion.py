"""Load files that lora_jax writes with the real diffusers and LyCORIS: the other half.

    python -m tests.parity.diffusion.check_diffusion PYTHON

with the Python of an environment that has diffusers and lycoris-lora (see `record_diffusion.py`).
"""

import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

import lora_jax
from lora_jax import diffusion
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import to_torch
from tests.parity.diffusion.models import FLUX, NAMING, base, flux_base
from tests.parity.peft.models import meaning


def unet():
    """Return the base without the text encoder, of which the oracle knows no DoRA."""
    return {path: x for path, x in base().items() if path.startswith("unet/")}


#: Of each written file: the base, the configuration, the arguments of `save`, and who reads it.
CASES = {
    "kohya": (base, {}, {}, "diffusers"),
    "kohya original": (base, {}, {"layout": "original"}, "diffusers"),
    "diffusers": (base, {}, {"style": "diffusers"}, "diffusers"),
    "diffusers dora": (unet, {"dora": True}, {"style": "diffusers"}, "diffusers"),
    "folded": (base, {}, {"style": "diffusers", "fold": True}, "diffusers"),
    "lycoris": (base, {}, {}, "lycoris"),
    "lycoris dora": (unet, {"dora": True}, {}, "lycoris"),
    "flux": (flux_base, {}, {"fold": True}, "diffusers"),
}


def adapted(tree, options):
    """Return random adapters of every kernel, of another rank for one."""
    layouts = {"x": "iiio", "y": "io"}
    paths = lora_jax.core.paths.flatten_with_paths(tree)[0]
    overrides = {
        path: {"layout": layouts["x" if x.ndim == 4 else "y"]}
        | ({"rank": 3, "alpha": 3 if options else 2} if "attn1/to_q" in path else {})
        for path, x in paths.items()
        if path.endswith("kernel")
    }
    config = lora_jax.LoraConfig(
        rank=2 if options or len(tree) < 20 else 1,
        alpha=2,
        targets=["kernel"],
        overrides=overrides,
        **options,
    )
    adapters = lora_jax.split(lora_jax.init(jax.random.key(0), tree, config))[1]
    rng = np.random.default_rng(0)
    moved = lambda path, x: (
        x if "scale" in str(path[-1]) else x + 0.3 * rng.normal(size=x.shape).astype("float32")
    )
    return jax.tree_util.tree_map_with_path(moved, adapters)


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        wanted = {}
        for case, (make, options, saving, _) in CASES.items():
            tree, naming = make(), FLUX if make is flux_base else NAMING
            adapters = adapted(tree, options)
            path = pathlib.Path(root) / f"{case}.safetensors"
            diffusion.save(path, adapters, naming, base=tree, **saving)
            merged = {
                p: np.asarray(x) for p, x in lora_jax.core.paths.flatten_with_paths(tree)[0].items()
            }
            nodes = adapted_nodes(adapters)
            for p, node in nodes.items():
                merged[p] = meaning(node, merged[p])
            names = set(to_torch(naming, {p: merged[p] for p in nodes}))
            wanted[case] = {n: x for n, x in to_torch(naming, merged).items() if n in names}
        for reader in ("diffusers", "lycoris"):
            paths = [
                str(pathlib.Path(root) / f"{c}.safetensors") for c in CASES if CASES[c][3] == reader
            ]
            command = [sys.argv[1], "-m", "tests.parity.diffusion.record_merged", reader, *paths]
            subprocess.run(command, check=True)
        for case, want in wanted.items():
            got = np.load(pathlib.Path(root) / f"{case}.safetensors.npz")
            assert set(got.files) == set(want), (case, set(got.files) ^ set(want))
            apart = max(np.abs(got[name] - x).max() for name, x in want.items())
            print(f"{apart:.1e}  {case}")
            assert apart < 1e-6, [n for n, x in want.items() if np.abs(got[n] - x).max() > 1e-6]


if __name__ == "__main__":
    main()
