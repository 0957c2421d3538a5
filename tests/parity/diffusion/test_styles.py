"""What other programs call modules, against diffusers 0.42.1's conversions of their files."""

import numpy as np
import pytest

from lora_jax import AdapterFileError, diffusion
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import to_torch
from tests.parity.diffusion.styles import NAMING, RECORDED, STYLES, changes, zeros
from tests.parity.peft.models import meaning


@pytest.mark.parametrize("style", STYLES)
def test_changes_are_those_of_diffusers(style, tmp_path):
    """Every module of the file has its place, and no other weight changes."""
    path, want, tree = tmp_path / "lora.safetensors", changes(style), zeros(style)
    path.write_bytes(RECORDED[f"{style}/file"].tobytes())
    nodes = adapted_nodes(diffusion.load(path, tree, NAMING, full_rank="train"))
    got = to_torch(NAMING, {path: meaning(node, tree[path]) for path, node in nodes.items()})
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=2e-6, err_msg=name)
    first = next(path for path in tree if path.endswith("kernel"))
    with pytest.raises(AdapterFileError, match="not in this base"):  # each is listed, none dropped
        diffusion.load(path, {first: tree[first]}, NAMING, full_rank="train")
