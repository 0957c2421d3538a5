"""Quantized tensors become leaves by moving codes: the values move as they do for floats."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lora_jax.core.errors import StructureError
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized
from lora_jax.files.naming import Entry, Naming, codes_of, leaf_like, to_tree

# row of a naming, kind, axis of the blocks, shape in PyTorch, shape of the leaf
ROWS = {
    "turned": (Entry("a", "a", "linear"), "q8_0", -1, (6, 64), (64, 6)),
    "heads": (Entry("b", "b", "linear", "(h d) i -> i h d"), "q5_1", -1, (6, 64), (64, 2, 3)),
    "stack": (Entry("c.{n}", "c", "linear", "o i -> i n o"), "q4_1", -1, (6, 64), (64, 2, 6)),
    "in_heads": (Entry("d", "d", "linear", "o (h d) -> h d o"), "q8_0", -1, (6, 64), (2, 32, 6)),
    "one_scale": (Entry("e", "e", "linear", "o (h d) -> h d o"), "int8", -1, (6, 64), (2, 32, 6)),
    "largest": (Entry("f", "f", "linear", "o (h d) -> h d o"), "nf4", -1, (6, 128), (2, 64, 6)),
    "joined": (Entry(("g.q", "g.k"), "g", "linear"), "q4_0", -1, (6, 64), (64, 12)),
    "shared": (Entry("h", ("h/q", "h/k"), "conv1d"), "q8_0", -2, (64, 12), (64, 6)),
    "rotary": (
        *(Entry("i", "i", "linear", "(h half two)i->i (h two half)", {"h": 2, "two": 2}), "q8_0"),
        *(-1, (12, 32), (32, 12)),
    ),
}


@dataclasses.dataclass
class Stored:
    """A tensor as a file has it."""

    weight: QuantizedWeight

    shape = property(lambda self: self.weight.shape)
    dtype = property(lambda self: self.weight.dtype)

    def codes(self):
        return self.weight


def tensors_of(entry, kind, axis, shape, leaf):
    rng = np.random.default_rng(0)
    layers = range(2) if "{n}" in entry.torch_names[0] else [0]
    names = [name.format(n=n) for name in entry.torch_names for n in layers]
    return {name: random_codes(kind, axis, shape, rng) for name in names}


def random_codes(kind, axis, shape, rng):
    size, fields = shape[axis], {}
    for name, field in KINDS[kind].fields.items():
        count = list(shape)
        count[axis] = field.entries(size, KINDS[kind].block or size)
        values = rng.integers(0, 100, count)
        fields[name] = values.astype(field.dtype)
    return QuantizedWeight(fields, kind, axis, np.dtype("float32"))


def kept(naming, tensors, like):
    """Return `like` with the shapes of codes."""
    leaves, treedef = flatten_with_paths(like)
    places = naming.places({path: leaf.shape for path, leaf in leaves.items()})
    first = lambda path: codes_of(tensors[places[path].layers()[0][1][0]])
    found = [leaf_like(places[path], first(path), leaf) for path, leaf in leaves.items()]
    return jax.tree_util.tree_unflatten(treedef, found)


def nested(paths, shape):
    tree = {}
    for path in paths:
        *outer, last = path.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(shape, "float32")
    return tree


def test_codes_move_as_values_do():
    naming, weights, like = Naming(tuple(row[0] for row in ROWS.values())), {}, {}
    for row in ROWS.values():
        weights |= tensors_of(*row)
        like |= nested(row[0].paths, row[4])
    stored = {name: Stored(weight) for name, weight in weights.items()}
    got = to_tree(naming, stored, kept(naming, stored, like))
    leaves = jax.tree.leaves(got, is_leaf=is_quantized)
    assert len(leaves) == len(ROWS) + 1 and all(map(is_quantized, leaves))
    values = lambda tree: jax.tree.map(lambda w: w.dequantize(), tree, is_leaf=is_quantized)
    floats = {name: np.asarray(x) for name, x in jax.jit(values)(weights).items()}
    want = to_tree(naming, floats, like)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(values)(got), want)


@pytest.mark.parametrize(
    ("entry", "axis", "shape", "leaf", "message"),
    [
        (
            *(Entry("a", "a", "linear", "o (h d) -> h d o"), -1, (6, 96), (2, 48, 6)),
            "a: cannot keep the codes of a: blocks of 32 (q8_0) along PyTorch's axis 1 do not stay "
            "whole in a leaf of shape (2, 48, 6). Load it as floats",
        ),
        (
            *(Entry("a", "a", "linear", "o (d h) -> (h d) o"), -1, (6, 128), (128, 6)),
            "do not stay whole",
        ),
        (Entry(("a", "b"), "a", "linear"), -2, (32, 6), (6, 64), "do not stay whole"),
    ],
)
def test_blocks_that_a_leaf_would_cut(entry, axis, shape, leaf, message):
    entry = dataclasses.replace(entry, sizes={"h": 2} if "h" in entry.axes else {})
    tensors = {n: Stored(x) for n, x in tensors_of(entry, "q8_0", axis, shape, leaf).items()}
    like = {"a": jax.ShapeDtypeStruct(leaf, "float32")}
    with pytest.raises(StructureError, match=re.escape(message)):
        kept(Naming((entry,)), tensors, like)


def test_tensors_of_another_kind_are_refused_if_that_of_the_leaf_cannot_be_written(monkeypatch):
    monkeypatch.setitem(KINDS, "q6_k", dataclasses.replace(KINDS["q6_k"], encode=None))
    entry = Entry("a.{n}", "a", "linear", "o i -> n i o")
    sizes = {"codes": (np.uint8, 128), "high": (np.uint8, 64), "scales": (np.int8, 16)}
    fields = {n: np.zeros((6, k), dtype) for n, (dtype, k) in sizes.items()}
    fields["d"] = np.zeros((6, 1), np.float16)
    stored = Stored(QuantizedWeight(fields, "q6_k", -1, np.dtype("float32")))
    tensors = {f"a.{n}": stored for n in range(2)}
    like = {"a": jax.ShapeDtypeStruct((2, 256, 6), "float32")}
    like = kept(Naming((entry,)), tensors, like)
    assert to_tree(Naming((entry,)), tensors, like)["a"].shape == (2, 256, 6)
    weight = np.ones((6, 256), np.float32)
    tensors["a.1"] = Stored(random_codes("q4_0", -1, (6, 256), np.random.default_rng(0)))
    with pytest.raises(StructureError, match=r"a\.1: is q4_0, but a is q6_k"):
        to_tree(Naming((entry,)), tensors, like)
    with pytest.raises(StructureError, match=r"a\.1: is not stored as codes, but a is q6_k"):
        to_tree(Naming((entry,)), tensors | {"a.1": weight}, like)
