"""Which tensor of a published file is which leaf of a parameter tree: plain data, a table of rows.

PyTorch files name tensors by module ("model.layers.0.self_attn.q_proj.weight") and keep the weight
of a linear layer as `[out, in]`. A JAX tree has paths ("layer_0/attention/query/kernel"), kernels
`[in, heads, head_dim]`, and often one array for all layers. A `Naming` says how to turn one into
the other. The same rows serve whole weights (`to_tree`, `to_torch`) and adapters (`lora_jax.peft`).
"""

from lora_jax.files.naming.codes import codes_of, leaf_like
from lora_jax.files.naming.entry import KINDS, Entry
from lora_jax.files.naming.place import Place
from lora_jax.files.naming.reading import StoredLeaf, row_ranges
from lora_jax.files.naming.table import Naming
from lora_jax.files.naming.translation import (
    index,
    to_stored_tree,
    to_torch,
    to_torch_tensors,
    to_tree,
)

__all__ = [
    "KINDS",
    "Entry",
    "Naming",
    "Place",
    "StoredLeaf",
    "codes_of",
    "index",
    "leaf_like",
    "row_ranges",
    "to_stored_tree",
    "to_torch",
    "to_torch_tensors",
    "to_tree",
]
