"""Trained rows of an embedding: these and nothing else move, wherever the table's programs go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import ConfigError, LayoutError, LoraConfig, StructureError, TargetError, TrainedRows
from lora_jax.core.tree import adapted_nodes
from tests.programs import CASES, normal
from tests.programs.jaxprs import weight_sized

KEY = jax.random.key(0)
VOCABULARY, WIDTH = 13, 5
ROWS = (12, 3)
PARAMS = {
    "embed": {"embedding": normal(1, (VOCABULARY, WIDTH), jnp.float32)},
    "up": {"kernel": normal(2, (WIDTH, WIDTH), jnp.float32)},
}
IDS = jnp.array([[1, 12, 1, 0], [3, 5, 12, 9]])


def tied(params, ids):
    """Looked up and attended to: one leaf, two uses."""
    table = params["embed"]["embedding"]
    return jnp.tanh(table[ids] @ params["up"]["kernel"]) @ table.T


def init(fn=tied, params=PARAMS, **fields):
    fields = {"rank": 2, "targets": (), "rows": {"embed": ROWS}, **fields}
    return lora_jax.init(KEY, params, LoraConfig(**fields), fn, IDS)


def moved(params):
    """Random values in the trained rows."""

    def one(node):
        if not isinstance(node, TrainedRows):
            return node
        return dataclasses.replace(node, value=normal(9, node.value.shape, node.value.dtype))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, TrainedRows))


def written(node):
    """The oracle: the rows written into the weight one by one."""
    axis, w = node.axis, np.array(node.w)
    value = np.asarray(node.value).astype(w.dtype)
    n_batch = node.layout.axes.count("b")
    batch = [i for i, letter in enumerate(node.layout.axes) if letter == "b"]
    assert batch == sorted(batch)
    for i, row in enumerate(node.rows):
        where = [slice(None)] * w.ndim
        where[axis] = row
        w[tuple(where)] = value[(slice(None),) * n_batch + (i,)]
    return w


# --- the engine -----------------------------------------------------------------------------------

QUICK = {"embed_lookup", "tied_attend", "layers_on_an_inner_axis", "lookups_out_of_bounds"}
ROW_CASES = [
    pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
    for case in CASES
    if all(axes.count("i") == 1 for axes in case.layouts.values())
]


@pytest.mark.parametrize("case", ROW_CASES)
def test_every_program_equals_itself_on_the_rows_written(case, quick_compile):
    fn, params, args = case.build(jnp.float32)
    leaves = {path: leaf for path, leaf in lora_paths(params).items() if path in case.layouts}
    rows = {
        path: (w.shape[case.layouts[path].index("i")] - 1, 0) if min(w.shape) > 1 else (0,)
        for path, w in leaves.items()
    }
    overrides = {path: {"layout": axes} for path, axes in case.layouts.items()}
    config = LoraConfig(targets=(), rows=rows, overrides=overrides)
    params = moved(lora_jax.init(KEY, params, config, fn, *args))
    nodes = adapted_nodes(params)
    assert set(nodes) == set(case.layouts)
    merged = lora_jax.merge(params)
    for path, node in nodes.items():
        np.testing.assert_array_equal(lora_paths(merged)[path], written(node))
    adapted = lora_jax.lora(fn, on_dense="error")

    def loss(fn, params):
        outs = [
            x for x in jax.tree.leaves(fn(params, *args)) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(jnp.sin(x).sum() for x in outs)

    got = jax.jit(lambda p: loss(adapted, p))(params)
    np.testing.assert_allclose(got, jax.jit(lambda p: loss(fn, p))(merged), rtol=1e-5, atol=1e-5)
    if case.reverse and case.differentiable:
        ours = jax.jit(jax.grad(lambda p: loss(adapted, p)))(params)
        dense = lora_paths(jax.jit(jax.grad(lambda p: loss(fn, p)))(merged))
        for path, node in adapted_nodes(ours).items():
            want = nodes[path].select(dense[path])
            scale = max(1.0, float(jnp.abs(want).max()))
            np.testing.assert_allclose(node.value / scale, want / scale, atol=1e-5)
            np.testing.assert_array_equal(node.w, 0)


def lora_paths(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_nothing_as_large_as_the_table_is_made():
    """Without the attend, whose own gradient is not wanted either."""
    fn = lambda params, ids: jnp.tanh(params["embed"]["embedding"][ids])
    base, adapters = lora_jax.split(init(fn))
    loss = lambda a: lora_jax.lora(fn)(lora_jax.join(base, a), IDS).sum()
    made = weight_sized(jax.make_jaxpr(jax.grad(loss))(adapters).jaxpr, [(VOCABULARY, WIDTH)])
    assert not made
    dense = lambda p: fn(p, IDS).sum()
    assert weight_sized(jax.make_jaxpr(jax.grad(dense))(PARAMS).jaxpr, [(VOCABULARY, WIDTH)])


# --- training -------------------------------------------------------------------------------------


def train(params, fn, tx, steps):
    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.square(fn(p, IDS) - 1).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("form", ["joined", "split"])
def test_only_the_rows_move(form, quick_compile):
    """PEFT's trainable tokens: as if the whole table trained and the other rows were put back."""
    start = init()
    base, adapters = lora_jax.split(start)
    adapted = lora_jax.lora(tied)
    fn = adapted if form == "joined" else lambda a, ids: adapted(lora_jax.join(base, a), ids)
    params = start if form == "joined" else adapters
    tx = lora_jax.freeze(optax.adamw(1e-2, weight_decay=0.1), params)
    trained = train(params, fn, tx, 3)
    trained = trained if form == "joined" else lora_jax.join(base, trained)
    got = lora_jax.merge(trained)
    others = np.setdiff1d(np.arange(VOCABULARY), ROWS)
    table, before = got["embed"]["embedding"], PARAMS["embed"]["embedding"]
    np.testing.assert_array_equal(table[others], before[others])
    np.testing.assert_array_equal(got["up"]["kernel"], PARAMS["up"]["kernel"])

    def oracle(value, ids):
        return tied({**PARAMS, "embed": {"embedding": before.at[ROWS, :].set(value)}}, ids)

    value = train(before[jnp.array(ROWS)], oracle, optax.adamw(1e-2, weight_decay=0.1), 3)
    np.testing.assert_allclose(table[jnp.array(ROWS)], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("optimized")
def test_rows_beside_a_low_rank_update_start_as_the_base():
    start = init(targets=["up"])
    assert isinstance(start["up"]["kernel"], lora_jax.LoraWeight)
    got = jax.jit(lora_jax.lora(tied))(start, IDS)
    np.testing.assert_array_equal(got, jax.jit(tied)(PARAMS, IDS))


@pytest.mark.usefixtures("optimized")
def test_disable_gives_back_the_base():
    off = lora_jax.disable(moved(init()))
    got = jax.jit(lora_jax.lora(tied))(off, IDS)
    np.testing.assert_array_equal(got, jax.jit(tied)(PARAMS, IDS))
    np.testing.assert_array_equal(
        lora_jax.merge(off)["embed"]["embedding"], PARAMS["embed"]["embedding"]
    )


def test_bfloat16_tables_get_float32_rows():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    node = moved(init(params=params))["embed"]["embedding"]
    assert node.value.dtype == jnp.float32
    merged = lora_jax.merge({"w": node})["w"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, written(node))


# --- the verbs ------------------------------------------------------------------------------------


def test_which_axis_holds_the_rows():
    place = lambda node: (node.layout.axes, node.axis)
    assert place(init()["embed"]["embedding"]) == ("io", 0)
    no_program = lora_jax.init(KEY, PARAMS, LoraConfig(targets=(), rows={"embedding": [0]}))
    assert place(no_program["embed"]["embedding"]) == ("io", 0)
    flipped = lambda params, ids: params["embed"]["embedding"][:, ids]
    assert place(init(flipped, rows={"embedding": [4]})["embed"]["embedding"]) == ("oi", 1)


def head(params, ids):
    return params["embed"]["embedding"][ids] @ params["up"]["kernel"]


@pytest.mark.parametrize("fn", [head, None])
@pytest.mark.parametrize("axis", [1, -1])
def test_rows_of_a_head_lie_along_its_out_axis(fn, axis):
    """The letters keep their meaning: the head is "io", and its rows are indices along axis 1."""
    config = LoraConfig(targets=(), rows={"up": [4, 0]}, overrides={"up": {"rows_axis": axis}})
    params = lora_jax.init(KEY, PARAMS, config, fn, *(() if fn is None else (IDS,)))
    node = params["up"]["kernel"]
    assert (node.layout.axes, node.axis) == ("io", 1)
    np.testing.assert_array_equal(node.value, PARAMS["up"]["kernel"][:, [4, 0]].T)
    params = moved(params)
    got, want = lora_jax.lora(head)(params, IDS), head(lora_jax.merge(params), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_named_layout_without_an_axis_means_its_in_axis():
    node = init(head, rows={"up": [4]}, overrides={"up": {"layout": "oi"}})["up"]["kernel"]
    assert (node.layout.axes, node.axis) == ("oi", 1)
    np.testing.assert_array_equal(node.value, PARAMS["up"]["kernel"][:, 4:].T)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({}, r"up/kernel: cannot tell along which axis of \(5, 5\) .* overrides=.*rows_axis=0"),
        ({"rows_axis": 2}, "up/kernel: rows_axis=2 is not an in or out axis"),
        ({"layout": "ooi", "rows_axis": -3}, "up/kernel: rows_axis=-3 is not an in or out axis"),
    ],
)
def test_axes_that_do_not_fit(override, message):
    with pytest.raises(LayoutError, match=message):
        init(head, rows={"up": [4]}, overrides={"up": {"alpha": 1, **override}})


def test_on_shapes_alone():
    shapes = jax.eval_shape(lambda: PARAMS)
    abstract = init(params=shapes)
    want = jax.tree.map(lambda x: (x.shape, x.dtype), init())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == want
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))


def test_counts_and_table():
    params = init(targets=["up"])
    assert lora_jax.count_params(params) == (2 * 5 + 20, 13 * 5 + 25 + 20)
    lines = [line.split() for line in lora_jax.summary(params).splitlines()]
    row = "embed/embedding [13, 5] io lookup, matmul; 2 rows trained - 10"
    assert row.split() in lines


def test_labels_and_optimizer_state():
    params = init()
    labels = lora_jax.labels(params)["embed"]["embedding"]
    assert (labels.w, labels.value, labels.scale) == ("freeze", "train", "freeze")
    state = lora_jax.freeze(optax.adam(1e-3), params).init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 10 + 1


def test_save_and_load(tmp_path):
    params = moved(init(targets=["up"]))
    base, adapters = lora_jax.split(params)
    lora_jax.save(tmp_path / "a", params)
    loaded = lora_jax.load(tmp_path / "a", base)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert jax.tree.structure(lora_jax.join(base, loaded)) == jax.tree.structure(params)
    other = {**base, "embed": {"embedding": jnp.ones((VOCABULARY, WIDTH))}}
    with pytest.raises(lora_jax.AdapterFileError, match="embed/embedding: other values"):
        lora_jax.load(tmp_path / "a", other)


def test_unmerge_keeps_the_rows():
    """What they replaced is not known; the merge of the result is the same to the bit."""
    params = moved(init())
    merged = lora_jax.merge(params)
    back = lora_jax.unmerge(merged, lora_jax.split(params)[1])
    again = lora_jax.merge(back)
    jax.tree.map(np.testing.assert_array_equal, again, merged)


def test_merge_refuses_nan():
    node = init()["embed"]["embedding"]
    broken = {"w": dataclasses.replace(node, value=node.value.at[1].set(jnp.nan))}
    with pytest.raises(lora_jax.MergeError, match="w: value"):
        lora_jax.merge(broken)


def test_export_and_back():
    params = moved(init(targets=["up"]))
    exported = jax.export.export(jax.jit(lora_jax.lora(tied)))(params, IDS)
    restored = jax.export.deserialize(exported.serialize())
    got, want = restored.call(params, IDS), lora_jax.lora(tied)(params, IDS)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_exports_from_before_the_axis_still_load():
    """What they say of a node ended after its layout's uses, and rows lay along the in axis."""
    params = init(targets=["up"])
    exported = jax.export.export(jax.jit(lora_jax.lora(tied)))(params, IDS)
    data = bytes(exported.serialize())
    for new, old in [
        (b'{"layout": ["io", ["dot_general"], false], "dropout": 0.0}',
         b'{"layout": ["io", ["dot_general"]], "dropout": 0.0}'),
        (b'{"rows": [12, 3], "axis": 0, "layout": ["io", ["gather", "dot_general"], false]}',
         b'{"rows": [12, 3], "layout": ["io", ["gather", "dot_general"]]}'),
    ]:  # fmt: skip
        assert data.count(new) > 0
        data = data.replace(new, old.ljust(len(new)))  # the same length, and JSON allows spaces
    restored = jax.export.deserialize(bytearray(data))
    np.testing.assert_allclose(restored.call(params, IDS), exported.call(params, IDS))


def test_join_refuses_a_base_that_does_not_fit():
    _, adapters = lora_jax.split(init())
    short = {**PARAMS, "embed": {"embedding": jnp.ones((10, WIDTH))}}
    with pytest.raises(StructureError, match=r"trained rows \[12\] are beyond the base's 10"):
        lora_jax.join(short, adapters)
    narrow = {**PARAMS, "embed": {"embedding": jnp.ones((VOCABULARY, 4))}}
    with pytest.raises(StructureError, match=r"trained rows \(2, 5\), .* needs \(2, 4\)"):
        lora_jax.join(narrow, adapters)


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (TargetError, {"rows": {"embed": [13]}}, r"rows \[13\] are beyond the 13"),
        (TargetError, {"rows": {"embde": [1]}}, "rows: 'embde' matches no weight; .*embed"),
        (TargetError, {"targets": ["embedding"]}, "embed/embedding: in targets and in rows"),
        (TargetError, {"train": ["embedding"]}, "embed/embedding: in train and in rows"),
        (ConfigError, {"rows": {"embed": [1, 3, 1]}}, r"names rows twice: \[1\]"),
        (ConfigError, {"rows": {"embed": [-1]}}, "integers of at least 0"),
        (ConfigError, {"rows": {"embed": []}}, "integers of at least 0"),
        (ConfigError, {"rows": {"embed": 3}}, "a sequence of row numbers"),
        (ConfigError, {"rows": [3]}, "rows must be a mapping"),
    ],
)
def test_refusals(error, fields, message):
    with pytest.raises(error, match=message):
        init(**fields)
