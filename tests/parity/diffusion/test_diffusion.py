"""LoRA files of lycoris-lora 4.1.3 and diffusers 0.42.1, against the weights that these make."""

import json
import re

import jax
import numpy as np
import pytest

from lora_jax import diffusion
from lora_jax.core.layout import Layout
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight
from lora_jax.files.diffusion import ARCHITECTURES
from lora_jax.files.diffusion.index import Index, Target
from lora_jax.files.diffusion.originals import originals
from lora_jax.files.diffusion.write_kohya import to_kohya
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming, index, to_torch
from lora_jax.files.torch_adapters.from_tree import collect
from tests.parity.diffusion.models import (
    CASES,
    FLUX,
    NAMING,
    RECORDED,
    base,
    flux_base,
    tensors,
    write,
)
from tests.parity.peft.models import meaning


def merged(adapters, tree, naming=NAMING):
    """Return the weights of the adapted leaves, under PyTorch's names."""
    weights = {path: np.asarray(x) for path, x in tree.items()}
    nodes = adapted_nodes(adapters)
    for path, node in nodes.items():
        weights[path] = meaning(node, weights[path])
    return to_torch(naming, {path: weights[path] for path in nodes})


def apart(got, want):
    assert got.keys() == want.keys()
    return max(np.abs(got[name] - x).max() for name, x in want.items())


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_the_librarys(case, tmp_path):
    adapters = diffusion.load(write(case, tmp_path), base(), NAMING, full_rank="train")
    want = tensors(f"{case}/merged")
    assert apart(merged(adapters, base()), want) <= 5e-7
    # and again after writing: kohya's style holds everything
    diffusion.save(tmp_path / "again.safetensors", adapters, NAMING, base=base())
    again = diffusion.load(tmp_path / "again.safetensors", base(), NAMING, full_rank="train")
    assert apart(merged(again, base()), want) <= 6e-7


@pytest.mark.parametrize(
    ("case", "saving"),
    [
        ("kohya", {}),
        ("kohya original", {"layout": "original"}),
        ("diffusers", {"style": "diffusers"}),
        ("diffusers dora", {"style": "diffusers"}),
        ("full", {}),
        ("norm", {}),
    ],
)
def test_a_file_is_written_as_it_was(case, saving, tmp_path):
    path = write(case, tmp_path)
    adapters = diffusion.load(path, base(), NAMING, full_rank="train")
    diffusion.save(tmp_path / "again.safetensors", adapters, NAMING, base=base(), **saving)
    want, header = safetensors_file.read(path)
    got, written = safetensors_file.read(tmp_path / "again.safetensors")
    names = {name.replace("lora_te_", "lora_te1_") if "original" in case else name for name in got}
    assert names == want.keys()
    for name, x in got.items():
        like = want[name.replace("lora_te_", "lora_te1_") if "original" in case else name]
        assert x.shape == like.shape
        np.testing.assert_allclose(x, like, atol=0 if ".lora_" in name else 1e-6)
    if "lora_adapter_metadata" in header:
        ours, theirs = (json.loads(x["lora_adapter_metadata"]) for x in (written, header))
        for key in ("r", "lora_alpha", "use_dora"):
            assert ours[f"unet.{key}"] == theirs[f"unet.{key}"]


def test_flux_splits_what_is_fused_and_joins_it_again(tmp_path):
    """Against `_convert_kohya_flux_lora_to_diffusers`, also on a tree with fused leaves."""
    path, want = write("flux", tmp_path), tensors("flux/merged")
    adapters = diffusion.load(path, flux_base(), FLUX)
    assert apart(merged(adapters, flux_base(), FLUX), want) <= 5e-7
    ranks = {path: node.rank for path, node in adapted_nodes(adapters).items()}
    block = "transformer/transformer_blocks/0/attn"
    assert [ranks[f"{block}/{x}/kernel"] for x in ("to_k", "add_k_proj")] == [3, 1]
    # joined again, with the rank of the original: q, k and v share A, or have rank 1 each
    diffusion.save(tmp_path / "again.safetensors", adapters, FLUX, base=flux_base())
    got, original = (safetensors_file.read(x)[0] for x in (tmp_path / "again.safetensors", path))
    keep = {name for name in original if not name.endswith("alpha")}
    assert keep == {name for name in got if not name.endswith("alpha")}
    assert {name: got[name].shape for name in keep} == {n: original[n].shape for n in keep}
    again = diffusion.load(tmp_path / "again.safetensors", flux_base(), FLUX)
    assert apart(merged(again, flux_base(), FLUX), want) <= 5e-7
    fused = Naming(
        (
            Entry(
                tuple(f"transformer.transformer_blocks.{{n}}.attn.to_{x}.weight" for x in "qkv"),
                "transformer/double_blocks/{n}/img_attn/qkv/kernel",
                "linear",
            ),
            *FLUX.entries,
        )
    )
    tree = {p: x for p, x in flux_base().items() if f"{block}/to_" not in p or "to_out" in p}
    leaf = "transformer/double_blocks/0/img_attn/qkv/kernel"
    tree[leaf] = np.zeros((3, 12), "float32")
    adapters = diffusion.load(path, tree, fused)
    assert apart(merged(adapters, tree, fused), want) <= 5e-7
    assert adapted_nodes(adapters)[leaf].rank == 3


@pytest.mark.parametrize("name", [n for n in RECORDED.files if n.startswith("modules/")])
def test_modules_are_those_of_the_library(name):
    architecture, component = name.removeprefix("modules/").split(" ")
    want = json.loads(RECORDED[name].tobytes())
    found = ARCHITECTURES[architecture].components[component].modules()
    assert sorted([m.name, m.kind, list(m.shape), m.bias] for m in found) == want
    leaves = {"linear": "kernel", "conv": "kernel", "norm": "scale", "embedding": "embedding"}
    paths = {
        f"{component}/{m.replace('.', '/')}/{leaves[kind]}": (
            tuple(shape) if kind in ("norm", "embedding") else (*shape[2:], shape[1], shape[0])
        )
        for m, kind, shape, _ in want
    }
    names = {f"{component}.{m}.weight" for m, *_ in want}
    assert index(diffusion.naming(architecture).places(paths)).keys() == names
    flat = {re.sub(r"/(?=\d+/)", "_", path): shape for path, shape in paths.items()}
    assert index(diffusion.naming(architecture, joined=True).places(flat)).keys() == names


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_original_names_are_those_of_the_original_code(architecture):
    """Against diffusers' converter of checkpoints; each name is found, and the first is written."""
    pairs = json.loads(RECORDED[f"originals/{architecture}"].tobytes())
    modules = ARCHITECTURES[architecture].modules
    index = Index(modules)
    for original, name in pairs:
        for spelled in (f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}"):
            assert index.find(spelled) == Target((f"unet.{name}",))
        assert original in [row.name for row in originals("unet", name)]
    samplers = {f"unet.{name}.weight": original for original, name in pairs if "upsamplers" in name}
    shapes = {
        f"{name}.weight": x.shape for name, x in modules.items() if x.kind in ("conv", "norm")
    }
    rows = Naming(
        tuple(
            Entry(n, n, "conv" if len(x) == 4 else "", "o i h w -> o i h w" if len(x) == 4 else "")
            for n, x in shapes.items()
        )
    )
    tree = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    zero = lambda *shape: np.zeros(shape, "float32")
    adapters = {
        name: LoraWeight(
            None,
            zero(*shapes[name][1:], 1),
            zero(1, shapes[name][0]),
            np.float32(1),
            layout=Layout("oiii"),
        )
        for name in samplers
    }
    written = to_kohya(*collect(adapters, rows, tree), {"unet": "original"}).factors
    assert sorted(written) == sorted(f"lora_unet_{x.replace('.', '_')}" for x in samplers.values())
