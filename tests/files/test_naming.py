"""PyTorch's names and axes against ones written by hand."""

import json

import jax
import numpy as np
import pytest

from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.files.naming import Entry, Naming, index, to_torch, to_tree

RNG = np.random.default_rng(0)


def tensor(*shape):
    return RNG.normal(size=shape).astype("float32")


QUERY = tensor(12, 5)  # [heads · head_dim, in]
FUSED = tensor(5, 8 + 4 + 4)  # GPT-2's [in, out]: a query twice as wide as key and value
EXPERTS = {f"layers.{n}.experts.{e}.w.weight": tensor(3, 4) for n in range(2) for e in range(3)}
CONV = tensor(6, 4, 3, 2)
GPT2 = Entry(
    "h.{n}.c_attn.weight",
    ("h_{n}/query/kernel", "h_{n}/key/kernel", "h_{n}/value/kernel"),
    "conv1d",
    "i (h d) -> i h d",
    {"d": 2},
)

# A row, the tensors, and the leaves that they must give.
CASES = {
    "linear": (
        Entry("q.weight", "q/kernel", "linear"),
        {"q.weight": QUERY},
        {"q/kernel": QUERY.T},
    ),
    "heads": (
        Entry("q.weight", "q/kernel", "linear", "(h d) i -> i h d"),
        {"q.weight": QUERY},
        {"q/kernel": QUERY.T.reshape(5, 3, 4)},
    ),
    "rotary": (  # interleaved pairs (0, 1), (2, 3) to halves (0, 2), (1, 3) in every head
        Entry("q.weight", "q/kernel", "linear", "(h d two) i -> i (h two d)", {"h": 3, "two": 2}),
        {"q.weight": QUERY},
        {"q/kernel": QUERY[[0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]].T},
    ),
    "fused in torch": (
        GPT2,
        {"h.7.c_attn.weight": FUSED},
        {
            "h_7/query/kernel": FUSED[:, :8].reshape(5, 4, 2),
            "h_7/key/kernel": FUSED[:, 8:12].reshape(5, 2, 2),
            "h_7/value/kernel": FUSED[:, 12:].reshape(5, 2, 2),
        },
    ),
    "fused in the tree": (
        Entry(("q.weight", "k.weight"), "qk/kernel", "linear", split=(12, 4)),
        {"q.weight": QUERY, "k.weight": QUERY[:4]},
        {"qk/kernel": np.concatenate([QUERY, QUERY[:4]]).T},
    ),
    "stacked layers and experts": (
        Entry("layers.{n}.experts.{e}.w.weight", "layers/w", "linear", "o i -> n e i o"),
        EXPERTS,
        {"layers/w": np.stack([x.T for x in EXPERTS.values()]).reshape(2, 3, 4, 3)},
    ),
    "convolution": (
        Entry("{*m}.weight", "{*m}/kernel", "conv"),
        {"net.conv.weight": CONV},
        {"net/conv/kernel": CONV.transpose(2, 3, 1, 0)},
    ),
    "stacked layers but for the first": (
        Entry("layers.{n}.w.weight", "layers/w", "linear", "o i -> n i o", first=1),
        {"layers.1.w.weight": QUERY, "layers.2.w.weight": 2 * QUERY},
        {"layers/w": np.stack([QUERY.T, 2 * QUERY.T])},
    ),
    "stacked norms": (
        Entry("layers.{n}.norm.weight", "layers/norm/scale", axes="d -> n d"),
        {"layers.0.norm.weight": QUERY[0], "layers.1.norm.weight": QUERY[1]},
        {"layers/norm/scale": QUERY[:2]},
    ),
    "scalar": (Entry("gate", "gate"), {"gate": np.float32(2)}, {"gate": np.float32(2)}),
}


def shapes_of(leaves):
    return {path: jax.ShapeDtypeStruct(np.shape(x), np.float32) for path, x in leaves.items()}


@pytest.mark.parametrize("name", CASES)
def test_weights_go_to_the_tree_and_back(name):
    row, tensors, leaves = CASES[name]
    tree = to_tree(Naming((row,)), tensors, shapes_of(leaves))
    assert tree.keys() == leaves.keys()
    for path, want in leaves.items():
        np.testing.assert_array_equal(tree[path], want)
    back = to_torch(Naming((row,)), tree)
    assert back.keys() == tensors.keys()
    for key, want in tensors.items():
        assert back[key].shape == np.shape(want)
        np.testing.assert_array_equal(back[key], want)


@pytest.mark.parametrize("name", [name for name, (row, *_) in CASES.items() if row.kind])
def test_factors_multiply_to_the_translated_update(name):
    """B·A in PyTorch's axes, converted, equals A·B of the converted factors."""
    row, _, leaves = CASES[name]
    for place in Naming((row,)).places({p: np.shape(x) for p, x in leaves.items()}).values():
        roles = {"linear": "oi", "conv1d": "io", "conv": "oiii"}[row.kind]
        ins = [size for size, role in zip(place.torch_shape, roles, strict=True) if role == "i"]
        outs = [size for size, role in zip(place.torch_shape, roles, strict=True) if role == "o"]
        a, b = tensor(2, *ins), tensor(*outs, 2)
        update = np.tensordot(b, a, 1)  # [out, *in]
        update = update.T if row.kind == "conv1d" else update
        want = place.weight_to_tree(update)
        tree_a, tree_b = place.a_to_tree(a), place.b_to_tree(b)
        kept = [role for role in row.layout if role != "b"]
        got = np.tensordot(tree_a, tree_b, 1)  # [*in, *out]
        order = np.argsort([i for r in "io" for i, k in enumerate(kept) if k == r])
        np.testing.assert_allclose(got.transpose(order), want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(place.a_to_torch(tree_a), a)
        np.testing.assert_array_equal(place.b_to_torch(tree_b), b)
        np.testing.assert_array_equal(place.out_to_torch(place.out_to_tree(b[:, 0])), b[:, 0])


def test_layouts():
    assert Entry("q", "q", "linear", "(h d) i -> i h d").layout == "ioo"
    assert CASES["stacked layers and experts"][0].layout == "bbio"
    assert CASES["convolution"][0].layout == "iiio"
    assert Entry("e", "e", "embedding", "n d -> d n").layout == "oi"


def test_the_index_finds_the_leaves_of_a_tensor():
    row, _, leaves = CASES["fused in torch"]
    places = Naming((row,)).places({path: x.shape for path, x in leaves.items()})
    found = index(places)["h.7.c_attn.weight"]
    assert [(place.path, place.start, place.stop) for place, _, _ in found] == [
        ("h_7/query/kernel", 0, 8),
        ("h_7/key/kernel", 8, 12),
        ("h_7/value/kernel", 12, 16),
    ]


def test_the_first_row_that_matches_is_used():
    naming = Naming((Entry("head.w", "head/kernel"), Entry("{*m}.weight", "{*m}/kernel", "linear")))
    places = naming.places({"head/kernel": (2, 3), "a/b/kernel": (2, 3), "bias": (3,)})
    assert {path: place.layers()[0][1] for path, place in places.items()} == {
        "head/kernel": ("head.w",),
        "a/b/kernel": ("a.b.weight",),
    }


def test_rows_without_placeholders_keep_their_turn():
    """They are looked up by path, but a pattern before them comes first, and one after does not."""
    rows = Naming(
        (
            Entry("own.a", "h/0/w"),
            Entry("h.{n}.w", "h/{n}/w"),
            Entry("late.a", "h/0/w"),
            Entry("late.b", "h/1/w"),
            Entry(("both.a", "both.b"), "x/w", "linear"),
        )
    )
    places = rows.places({"h/0/w": (2,), "h/1/w": (2,), "x/w": (2, 4), "y/w": (2,)})
    names = {path: place.layers()[0][1] for path, place in places.items()}
    assert names == {"h/0/w": ("own.a",), "h/1/w": ("h.1.w",), "x/w": ("both.a", "both.b")}


def test_everything_wrong_with_the_tensors_is_told_at_once():
    naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    like = shapes_of({f"{x}/kernel": np.empty((2, 3)) for x in "abc"} | {"odd": np.empty(1)})
    tensors = {
        "a.weight": np.ones((2, 3), "float32"),
        "b.weight": np.ones((3, 2), "int32"),
        "more.weight": np.ones(1),
        "rotary.inv_freq": np.ones(1),
    }
    with pytest.raises(StructureError) as caught:
        to_tree(naming, tensors, like, ignore=[r".*inv_freq"])
    assert str(caught.value).splitlines() == [
        "a.weight: has shape (2, 3), but a/kernel needs (3, 2)",
        "b.weight: is int32, but b/kernel is float32",
        "c.weight: missing, (3, 2) for c/kernel",
        "more.weight: unexpected",
        "odd: no row of the naming has this path",
    ]


def test_a_shared_tensor_is_not_written_in_part():
    _, _, leaves = CASES["fused in torch"]
    with pytest.raises(StructureError, match="h_7/value/kernel, which is not in the tree"):
        to_torch(Naming((GPT2,)), {k: v for k, v in leaves.items() if "value" not in k})


def test_leaves_that_do_not_fit_their_rows():
    naming = Naming((Entry("q", "q", "linear", "(h d) i -> i h d", {"d": 4}),))
    with pytest.raises(StructureError, match=r"q: axis \(d\) has size 3.*\{'d': 4\}"):
        naming.places({"q": (5, 3, 3)})
    with pytest.raises(StructureError, match=r"q: has shape \(5, 12\), but its row has"):
        naming.places({"q": (5, 12)})
    row = Entry(("q", "k", "v"), "qkv", "linear")
    (place,) = Naming((row,)).places({"qkv": (5, 16)}).values()
    with pytest.raises(StructureError, match=r"16 outputs are not 5 \+ 5 \+ 5; add to the"):
        to_torch(Naming((row,)), {place.path: np.ones(place.shape)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("q", "q", "dense"), "kind 'dense' is not one of 'linear'"),
        ((("q", "k"), ("q", "k")), "only one of the two may be several"),
        ((("{n}.q", "k"), "q"), "need the same placeholders"),
        (("q", "{n}/q"), "no PyTorch name has the path's placeholder n"),
        (("{n}.q", "q"), "a stacked leaf needs axes"),
        (("{n}.q", "q", "linear"), "do not have the same letters"),
        (("{n}.q", "q", "linear", "o i -> (n i) o"), "must be a separate axis"),
        (("q", "q", "linear", "o i -> i"), "do not have the same letters"),
        (("q", "q", "linear", "o i j -> i o j"), "has 2 axes"),
        (("q", "q", "linear", "(h d) i -> (i h) d"), "mixes in and out axes"),
        (("q", "q", "experts", "(g e) o i -> (g e) i o"), "several axes of experts into one axis"),
        (
            ("q", "q", "experts", "o i -> i o"),
            "'experts' has 3 axes, but 'o i -> i o' names 2",
        ),
        (("q", "q", "linear", "rank i -> i rank"), "same letters"),
        (("q", "q", "linear", "o i, i o"), "is not a pattern"),
        (("q", "q", "linear", "o o -> o o"), "names an axis twice"),
    ],
)
def test_rows_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        Entry(*fields)


def test_json_round_trip_and_its_errors():
    naming = Naming(tuple(row for row, *_ in CASES.values()))
    assert Naming.from_json(json.loads(json.dumps(naming.to_json()))) == naming
    for wrong, message in [
        ({}, "a naming must be a list"),
        ([{"torch": "a"}], "row 0 of the naming"),
        ([{"torch": "a", "path": "a", "shape": 1}], "optionally axes, first, kind"),
        ([{"torch": "a", "path": "a", "sizes": {"d": "4"}}], "invalid sizes "),
        ([{"torch": "a", "path": []}], "invalid path "),
        ([{"torch": "a", "path": "a", "split": [True]}], "invalid split "),
        ([{"torch": "a", "path": "a", "first": -1}], "invalid first "),
    ]:
        with pytest.raises(ConfigError, match=message):
            Naming.from_json(wrong)


def test_a_prefix_goes_before_every_name():
    naming = Naming((GPT2, CASES["fused in the tree"][0])).with_prefix("model.")
    assert [entry.torch for entry in naming.entries] == [
        "model.h.{n}.c_attn.weight",
        ("model.q.weight", "model.k.weight"),
    ]
