"""What does not fit, in files that are read and in adapters that are written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, StructureError, peft, tensorfile
from lora_jax.overlay import adapted_nodes
from tests.peft import models
from tests.peft.models import PLAIN, SPLIT, STACKED

BASE = models.base("plain")
SHAPES = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in BASE.items()}
PREFIX = "base_model.model."
UP = "model/layers/1/up/kernel"


@pytest.fixture
def edited(tmp_path):
    """A recorded case, its tensors and configuration changed."""

    def edit(case, change=lambda tensors: None, **fields):
        folder = models.unpack(case, tmp_path / case)
        config = json.loads((folder / peft.CONFIG).read_text()) | fields
        (folder / peft.CONFIG).write_text(json.dumps(config))
        tensors, _ = tensorfile.read(folder / peft.TENSORS)
        change(tensors)
        tensorfile.write(folder / peft.TENSORS, tensors)
        return folder

    return edit


def adapted(config, which="plain"):
    """Adapters at random, the scales the configuration's; no program is compiled for them."""
    rng = np.random.default_rng(0)
    nodes = lora_jax.init(jax.random.key(0), models.shapes(which), config)

    def one(path, node):
        _, scale, _ = config.for_path(path)
        made = {"scale": np.full(node.scale.shape, scale, "f4")}
        for field in ("a", "b", "magnitude", "value"):
            x = getattr(node, field, None)
            made[field] = x and jnp.asarray(rng.normal(size=x.shape), x.dtype)
        fields = {f.name for f in dataclasses.fields(node)}
        made = {field: x for field, x in made.items() if field in fields}
        return dataclasses.replace(node, w=None, **made)

    return {path: one(path, node) for path, node in adapted_nodes(nodes).items()}


def equal(some, others):
    assert adapted_nodes(some).keys() == adapted_nodes(others).keys()
    jax.tree.map(np.testing.assert_array_equal, some, others)


# --- reading --------------------------------------------------------------------------------------


def break_everything(tensors):
    layers = f"{PREFIX}model.layers"
    del tensors[f"{layers}.0.up.lora_B.weight"]
    del tensors[f"{layers}.1.up.lora_magnitude_vector"]
    tensors[f"{layers}.1.down.lora_A.weight"] = np.ones((3, 9), "f4")
    tensors[f"{layers}.2.down.lora_B.weight"] = np.ones((6, 4), "f4")
    tensors[f"{PREFIX}model.conv2.lora_A.weight"] = np.ones((3, 2, 6), "f4")
    tensors[f"{PREFIX}model.emb.lora_embedding_A"] = np.ones((3, 17), "i4")
    tensors[f"{layers}.0.norm.lora_A.weight"] = np.ones((3, 6), "f4")
    tensors[f"{layers}.7.up.lora_A.weight"] = np.ones((3, 6), "f4")
    tensors[f"{layers}.0.up.lora_B.bias"] = np.ones(10, "f4")
    tensors[f"{PREFIX}model.pooler.weight"] = np.ones((4, 4), "f4")
    tensors[f"{PREFIX}head.bias"] = np.ones(5, "f4")
    tensors["model.layers.0.up.lora_A.default.weight"] = np.ones((3, 6), "f4")


BROKEN = """
base_model.model.head.bias: has shape (5,), needs (4,)
base_model.model.model.conv2.lora_A.weight: has shape (3, 2, 6), needs (3, 2, 3, 2) at rank 3
base_model.model.model.emb.lora_embedding_A: is int32, only floating tensors are trained
base_model.model.model.emb.lora_embedding_A: missing, (3, 17)
base_model.model.model.layers.0.norm.lora_A.weight: model.layers.0.norm.weight is no module
base_model.model.model.layers.0.up.lora_B.bias: unexpected for a module of kind linear
base_model.model.model.layers.0.up.lora_B.weight: missing, (10, 3)
base_model.model.model.layers.1.down.lora_A.weight: has shape (3, 9), needs (3, 10) at rank 3
base_model.model.model.layers.1.up.lora_magnitude_vector: missing, (10,)
base_model.model.model.layers.2.down.lora_B.weight: has shape (6, 4), needs (6, 3) at rank 3
base_model.model.model.layers.7.up.lora_A.weight: not in this base; nearest paths: model.layers.
base_model.model.model.pooler.weight: not in this base; nearest paths: model.
model.layers.0.up.lora_A.default.weight: unexpected: PEFT's names begin with base_model.model.
"""


def test_everything_wrong_is_told_at_once(edited):
    folder = edited("dora", break_everything)
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, BASE, PLAIN)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{folder / peft.TENSORS} does not fit the base:"
    for line, start in zip(lines, BROKEN.strip().splitlines(), strict=True):
        assert line.startswith(start)


def test_not_strict_takes_what_fits_and_tells_the_rest(edited):
    folder = edited("dora", break_everything)
    with pytest.warns(UserWarning) as caught:
        adapters = peft.load(folder, BASE, PLAIN, strict=False)
    (warning,) = caught
    assert warning.filename == __file__
    assert len(str(warning.message).splitlines()) == 1 + len(BROKEN.strip().splitlines())
    assert adapted_nodes(adapters).keys() == {
        *("model/conv1/kernel", "model/layers/0/down/kernel", "model/layers/2/up/kernel"),
    }
    whole = adapted_nodes(peft.load(models.unpack("dora", folder), BASE, PLAIN))
    for path, node in adapted_nodes(adapters).items():
        equal(node, whole[path])


def test_modules_that_are_targeted_and_missing(edited):
    def drop(tensors):
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    with pytest.raises(AdapterFileError) as caught:
        peft.load(edited("linear", drop), BASE, PLAIN)
    assert len(str(caught.value).splitlines()) == 3
    assert "layers.1.up.lora_A.weight: missing, though target_modules" in str(caught.value)
    nodes = adapted_nodes(
        peft.load(edited("linear", drop, layers_to_transform=[0, 2]), BASE, PLAIN)
    )
    assert len(nodes) == 4


def test_ranks_other_than_the_configurations(edited):
    folder = edited("linear", rank_pattern={"layers.1.up": 2})
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, BASE, PLAIN)
    assert [line.rpartition("layers")[2] for line in str(caught.value).splitlines()[1:]] == [
        ".1.up.lora_A.weight: has shape (3, 6), needs (2, 6) at rank 2",
        ".1.up.lora_B.weight: has shape (10, 3), needs (10, 2) at rank 2",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_not_finite(value, strict, edited):
    name = f"{PREFIX}model.layers.1.up.lora_A.weight"
    folder = edited("linear", lambda tensors: tensors[name].__setitem__((1, 2), value))
    with pytest.raises(AdapterFileError, match=r"NaN or infinite values in:\n.*layers.1.up.lora_A"):
        peft.load(folder, BASE, PLAIN, strict=strict)


def test_nothing_fits(edited):
    folder = edited("linear")
    with pytest.raises(AdapterFileError, match="nothing in it fits the base"):
        peft.load(folder, {"head/kernel": BASE["head/kernel"]}, PLAIN, strict=False)


def test_missing_files_and_pickles(edited):
    folder = edited("linear")
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"no such file; adapter_model.bin is a pickle"):
        peft.load(folder, BASE, PLAIN)


def test_shapes_are_enough(edited):
    for case in ("patterns", "dora", "bias all", "modules_to_save", "tokens"):
        folder = edited(case)
        equal(peft.load(folder, SHAPES, PLAIN), peft.load(folder, BASE, PLAIN))
    with pytest.raises(AdapterFileError) as caught:
        peft.load(edited("lora_bias"), SHAPES, PLAIN)
    assert str(caught.value).count("lora_bias adds to it, and the base given has no values") == 3


def test_a_joined_tree_is_a_base_too(edited):
    folder = edited("linear")
    joined = lora_jax.join(BASE, peft.load(folder, BASE, PLAIN))
    equal(peft.load(folder, joined, PLAIN), peft.load(folder, BASE, PLAIN))


def test_a_copy_of_the_base_weight_must_be_the_bases(edited):
    """PEFT saves the weights of embeddings that it adapts along with the factors."""
    name, weight = f"{PREFIX}model.emb.base_layer.weight", np.array(BASE["model/emb/embedding"])
    add = lambda x: lambda tensors: tensors.__setitem__(name, x)
    want = peft.load(edited("embedding"), BASE, PLAIN)
    equal(peft.load(edited("embedding", add(weight)), BASE, PLAIN), want)
    half = np.asarray(jnp.asarray(weight, jnp.bfloat16))
    equal(peft.load(edited("embedding", add(half)), BASE, PLAIN), want)
    with pytest.raises(AdapterFileError, match="brings its own base weight"):
        peft.load(edited("embedding", add(weight + 0.1)), BASE, PLAIN)
    with pytest.raises(AdapterFileError, match=r"has shape \(18, 6\), needs \(17, 6\)"):
        peft.load(edited("embedding", add(np.ones((18, 6), "f4"))), BASE, PLAIN)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"other": [1, 2, 3]}, "does not say which rows"),
        (None, "does not say which rows"),
        ({"emb": [1, 2]}, r"has shape \(3, 6\), needs \(2, 6\)"),
        ({"emb": [1, 2, 17]}, "rows twice, or beyond 17"),
        ({"emb": [1, 2, 1]}, "rows twice, or beyond 17"),
    ],
)
def test_rows_that_cannot_be(indices, message, edited):
    with pytest.raises(AdapterFileError, match=message):
        peft.load(edited("tokens", trainable_token_indices=indices), BASE, PLAIN)
    rows = peft.load(edited("tokens", trainable_token_indices=[9, 2, 13]), BASE, PLAIN)
    assert rows["model/emb/embedding"].rows == (9, 2, 13)


def test_the_dtype_can_be_chosen(edited):
    stored = peft.load(edited("bfloat16"), BASE, PLAIN)[UP]
    assert (stored.a.dtype, stored.b.dtype, stored.scale.dtype) == ("bfloat16",) * 2 + ("float32",)
    wide = peft.load(edited("bfloat16"), BASE, PLAIN, dtype=jnp.float32)[UP]
    assert wide.a.dtype == wide.b.dtype == "float32"
    np.testing.assert_array_equal(wide.a, stored.a.astype("float32"))


# --- stacks ---------------------------------------------------------------------------------------


def test_layers_that_the_file_lacks_are_off(edited):
    node = peft.load(edited("one module"), models.base("stacked"), STACKED)[
        "model/layers/up/kernel"
    ]
    np.testing.assert_array_equal(node.scale != 0, [False, True, False])
    assert not node.a[0].any() and not node.b[2].any() and node.a[1].any()


def test_ranks_within_a_stack_are_padded(edited, tmp_path):
    adapters = peft.load(edited("patterns"), models.base("stacked"), STACKED)
    down = adapters["model/layers/down/kernel"]
    assert down.a.shape == (3, 10, 5) and not down.a[0, :, 3:].any() and down.a[2, :, 3:].any()
    config = tmp_path / "again"
    peft.save(config, adapters, STACKED, base=models.base("stacked"))
    read = peft.read_config(config)
    assert [read.rank(f"model.layers.{n}.down") for n in range(3)] == [3, 3, 5]


def test_a_layer_that_is_off_is_not_written(tmp_path):
    config = lora_jax.LoraConfig(
        rank=2, targets=["down/kernel"], overrides={"down": {"layout": "bio"}}, layers=[0, 2]
    )
    params = lora_jax.init(jax.random.key(0), models.base("stacked"), config)
    peft.save(tmp_path, params, STACKED)
    modules = {
        name.split(".lora")[0] for name in tensorfile.headers(tmp_path / peft.TENSORS).tensors
    }
    assert modules == {f"{PREFIX}model.layers.{n}.down" for n in (0, 2)}
    written = peft.read_config(tmp_path)
    assert written.target_modules == ("model.layers.0.down", "model.layers.2.down")


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["up/kernel", "down/kernel"], ("down", "up")),
        (["1/up/kernel"], ("model.layers.1.up",)),
        (["odd/weight/kernel", "up/kernel"], ("model.odd.weight", "up")),
    ],
)
def test_targets_are_short_where_that_is_enough(targets, written, tmp_path):
    config = lora_jax.LoraConfig(rank=2, targets=targets)
    peft.save(tmp_path, adapted(config), PLAIN, base=BASE)
    assert peft.read_config(tmp_path).target_modules == written
    peft.save(tmp_path, adapted(config), PLAIN)  # without the base: nothing else is known
    names = peft.read_config(tmp_path).target_modules
    assert all(name.startswith("model.") for name in names) and len(names) >= len(written)


def test_a_regular_expression_where_names_are_not_enough(tmp_path):
    base = {"up": {"kernel": jnp.ones((2, 3))}, "x": {"up": {"kernel": jnp.ones((2, 3))}}}
    config = lora_jax.LoraConfig(rank=1, targets=r"up/kernel")
    params = lora_jax.init(jax.random.key(0), base, config)
    peft.save(tmp_path, params, PLAIN)
    assert peft.read_config(tmp_path).target_modules == "up"
    assert json.loads((tmp_path / peft.CONFIG).read_text())["target_modules"] == "up"


def test_patterns_of_the_modules_that_differ(tmp_path):
    ranks = {"0/up": {"rank": 4}, "down": {"rank": 4, "alpha": 2}}
    config = lora_jax.LoraConfig(
        rank=2, alpha=3, targets=["up/kernel", "down/kernel"], overrides=ranks
    )
    peft.save(tmp_path, adapted(config), PLAIN, config=config)
    written = peft.read_config(tmp_path)
    assert (written.r, written.lora_alpha) == (4, 3)
    assert written.rank_pattern == {f"model.layers.{n}.up": 2 for n in (1, 2)}
    assert written.alpha_pattern == {f"model.layers.{n}.down": 2 for n in range(3)}


def test_folded_files_say_the_same_without_patterns(edited, tmp_path):
    adapters = peft.load(edited("patterns"), BASE, PLAIN)
    peft.save(tmp_path, adapters, PLAIN, base=BASE, fold=True)
    config, folded = peft.read_config(tmp_path), peft.load(tmp_path, BASE, PLAIN)
    assert config.r == config.lora_alpha == 5 and not config.rank_pattern | config.alpha_pattern
    for path, node in adapted_nodes(adapters).items():
        got = folded[path]
        assert got.rank == 5 and got.scale == 1
        zero = np.zeros(node.shape, "f4")
        want = models.meaning(node, zero)
        np.testing.assert_allclose(models.meaning(got, zero), want, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dora": True}, "up.weight: DoRA cannot be folded"),
        ({"train": ["head/kernel"]}, "head.weight: is trained itself"),
        ({"rows": {"emb": [3]}}, "emb.weight: is trained itself"),
        ({"bias": "adapted"}, "up.bias: is trained itself"),
    ],
)
def test_folding_is_for_factors(fields, message, tmp_path):
    config = lora_jax.LoraConfig(rank=2, targets=["up/kernel"], **fields)
    with pytest.raises(StructureError, match=message):
        peft.save(tmp_path / "new", adapted(config), PLAIN, base=BASE, fold=True)
    assert not (tmp_path / "new").exists()


def up_alone(**fields):
    return adapted(lora_jax.LoraConfig(rank=2, targets=["up/kernel"], **fields))


def mixed():
    nodes = up_alone(dora=True)
    return nodes | {UP: dataclasses.replace(nodes[UP], magnitude=None)}


CANNOT = {
    "nothing": (lambda: {}, {}, "the tree holds no adapters"),
    "no factors": (
        lambda: adapted(lora_jax.LoraConfig(targets=(), train=["head/kernel"])),
        {"base": BASE},
        "no module has factors",
    ),
    "dora on some": (mixed, {}, "DoRA on some modules alone; without it: model.layers.1.up.weight"),
    "shapes": (
        lambda: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), up_alone()),
        {},
        "model/layers/1/up/kernel: no values yet, only shapes",
    ),
    "rows without a base": (
        lambda: up_alone(rows={"emb": [3]}),
        {},
        "emb/embedding: rows of an embedding need base=",
    ),
    "a part of a module": (
        lambda: up_alone(train=["head/kernel"]),
        {"base": SHAPES},
        "head.bias: is in a module that is saved whole; its value needs base=",
    ),
    "another base": (up_alone, {"base": {"up": BASE[UP]}}, "1/up/kernel: not in the base; nearest"),
    "all off": (lambda: lora_jax.disable(up_alone()), {}, "no module has factors"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_file_cannot_hold(name, tmp_path):
    make, options, message = CANNOT[name]
    with pytest.raises(StructureError, match=message):
        peft.save(tmp_path / "new", make(), PLAIN, **options)
    assert not (tmp_path / "new").exists()


def test_paths_that_the_naming_lacks(tmp_path):
    naming = lora_jax.naming.Naming(PLAIN.entries[:1])
    with pytest.raises(StructureError, match="1/up/kernel: no row of the naming has this path"):
        peft.save(tmp_path / "new", up_alone(), naming)
    with pytest.raises(AdapterFileError, match="not in this base"):
        peft.load(models.unpack("linear", tmp_path), BASE, naming)


def test_another_layout_than_the_rows(tmp_path):
    nodes = up_alone()
    turned = dataclasses.replace(nodes[UP], layout=lora_jax.Layout("oi"))
    with pytest.raises(StructureError, match="layout 'oi', its row in the naming is of kind 'lin"):
        peft.save(tmp_path / "new", {UP: turned}, PLAIN)


def test_parts_of_a_fused_module(edited, tmp_path):
    """Different A's of query and value, none of key: one module whose rank is the sum."""
    base = models.base("split")
    where = {"layout": "ioo"}
    config = lora_jax.LoraConfig(
        rank=2,
        alpha=3,
        targets=[f"1/{part}/kernel" for part in ("query", "value")],
        overrides={"query": where, "value": {**where, "rank": 1}},
    )
    adapters = adapted(config, "split")
    peft.save(tmp_path, adapters, SPLIT, base=base)
    tensors, _ = tensorfile.read(tmp_path / peft.TENSORS)
    b = tensors[f"{PREFIX}model.layers.1.c_attn.lora_B.weight"]
    assert b.shape == (18, 3) and not b[6:12].any() and not b[:6, 2:].any() and not b[12:, :2].any()
    again = peft.load(tmp_path, base, SPLIT)
    for path, node in adapted_nodes(adapters).items():
        zero = np.zeros(node.shape, "f4")
        want = models.meaning(node, zero)
        np.testing.assert_allclose(models.meaning(again[path], zero), want, rtol=1e-4, atol=1e-6)


def test_saving_again_replaces_both_files(tmp_path):
    peft.save(tmp_path, up_alone(), PLAIN, base=BASE, task_type="CAUSAL_LM", base_model="me/it")
    config = peft.read_config(tmp_path)
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "me/it")
    (tmp_path / "README.md").write_text("mine")
    peft.save(tmp_path, up_alone(dora=True), PLAIN, base=BASE, config=config)
    again = peft.read_config(tmp_path)
    assert again.use_dora and again.task_type == "CAUSAL_LM"
    assert {path.name for path in tmp_path.iterdir()} == {peft.CONFIG, peft.TENSORS, "README.md"}


def test_a_component_that_is_zero_in_b_alone_is_kept(tmp_path):
    """At the start of training B is zero; A is not padding."""
    nodes = up_alone()
    node = dataclasses.replace(nodes[UP], b=nodes[UP].b.at[1].set(0))
    padded = dataclasses.replace(node, a=node.a.at[:, 1].set(0))
    for one, rank in ((node, 2), (padded, 1)):
        peft.save(tmp_path, {UP: one}, PLAIN)
        assert peft.read_config(tmp_path).r == rank
        assert peft.load(tmp_path, BASE, PLAIN)[UP].rank == rank


def test_magnitudes_of_layers_that_are_off_are_the_bases(edited):
    """Switched on by mistake, a layer without an adapter is still the base."""

    def drop(tensors):
        for name in [name for name in tensors if ".layers.1." not in name]:
            del tensors[name]

    base = models.base("stacked")
    folder = edited("dora", drop, target_modules=["layers.1.up", "layers.1.down"])
    adapters = peft.load(folder, base, STACKED)
    node = adapters["model/layers/up/kernel"]
    w = np.asarray(base["model/layers/up/kernel"])
    np.testing.assert_array_equal(node.scale != 0, [False, True, False])
    np.testing.assert_allclose(node.magnitude[0], np.linalg.norm(w[0], axis=0), rtol=1e-6)
    on = models.meaning(dataclasses.replace(node, scale=np.ones(3, "f4")), w)
    np.testing.assert_allclose(on[[0, 2]], w[[0, 2]], rtol=1e-6)


def test_biases_of_layers_that_are_off_are_not_written(edited, tmp_path):
    base = models.base("stacked")
    adapters = peft.load(edited("bias lora_only"), base, STACKED)
    leaf = adapters["model/layers/up/bias"]
    assert leaf.scale.shape == ()
    off = dataclasses.replace(leaf, scale=jnp.array([[1.0], [0.0], [1.0]]))
    peft.save(tmp_path, adapters | {"model/layers/up/bias": off}, STACKED, base=base)
    names = tensorfile.headers(tmp_path / peft.TENSORS).tensors
    found = [n for n in range(3) if f"{PREFIX}model.layers.{n}.up.base_layer.bias" in names]
    assert found == [0, 2]
    again = peft.load(tmp_path, base, STACKED)["model/layers/up/bias"]
    np.testing.assert_array_equal(again.scale, off.scale)
    np.testing.assert_array_equal(again.value[0], leaf.value[0])
    np.testing.assert_array_equal(again.value[1], base["model/layers/up/bias"][1])


def test_what_a_lora_config_says_is_written(tmp_path):
    config = lora_jax.LoraConfig(
        rank=4, alpha=6, targets=["up/kernel"], scaling="rslora", dropout=0.25
    )
    peft.save(tmp_path, adapted(config), PLAIN, config=config)
    written = peft.read_config(tmp_path)
    assert (written.r, written.lora_alpha, written.lora_dropout) == (4, 6, 0.25)
    assert written.use_rslora and not written.rank_pattern | written.alpha_pattern
    assert peft.load(tmp_path, BASE, PLAIN)[UP].scale == 3.0


# --- an embedding that is the head too ------------------------------------------------------------

TIED = lora_jax.naming.Naming(
    (
        lora_jax.naming.Entry("model.embed_tokens.weight", "embed/embedding", "embedding"),
        lora_jax.naming.Entry("model.up.weight", "up/kernel", "linear"),
        lora_jax.naming.Entry("lm_head.weight", "head/kernel", "linear"),
    )
)
TIED_BASE = {"embed/embedding": jnp.ones((5, 3)), "up/kernel": jnp.ones((3, 4))}


def tied(**fields):
    layouts = {} if "train" in fields else {"embed/embedding": {"layout": "io"}}
    config = lora_jax.LoraConfig(rank=2, overrides=layouts, **fields)
    params = lora_jax.init(jax.random.key(0), TIED_BASE, config)
    return lora_jax.split(params)[1]


def test_a_tied_head_is_written_and_read_with_its_embedding(tmp_path):
    adapters = tied(targets=["embedding", "up/kernel"])
    peft.save(tmp_path, adapters, TIED, base=TIED_BASE)
    config = peft.read_config(tmp_path)
    assert config.ensure_weight_tying
    assert config.target_modules == ("model.embed_tokens", "model.up")
    tensors, _ = tensorfile.read(tmp_path / peft.TENSORS)
    for copy, own in (("A", "B"), ("B", "A")):
        own = tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{own}"]
        np.testing.assert_array_equal(tensors[f"{PREFIX}lm_head.lora_{copy}.weight"], own.T)
    equal(peft.load(tmp_path, TIED_BASE, TIED), adapters)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] += 1
    tensorfile.write(tmp_path / peft.TENSORS, tensors)
    with pytest.raises(AdapterFileError, match=r"lm_head.lora_A.weight: is not the embedding's"):
        peft.load(tmp_path, TIED_BASE, TIED)
    with pytest.raises(StructureError, match="whether it is the head too needs base="):
        peft.save(tmp_path, adapters, TIED)


def test_an_embedding_adapted_as_a_lookup_alone_does_not_fit_a_tied_tree(tmp_path):
    untied = TIED_BASE | {"head/kernel": jnp.ones((3, 5))}
    adapters = tied(targets=["embedding", "up/kernel"])
    peft.save(tmp_path, adapters, TIED, base=untied)
    assert not peft.read_config(tmp_path).ensure_weight_tying
    assert adapted_nodes(peft.load(tmp_path, untied, TIED)).keys() == TIED_BASE.keys()
    with pytest.raises(AdapterFileError, match="adapts it as a lookup alone"):
        peft.load(tmp_path, TIED_BASE, TIED)


def test_a_tied_embedding_saved_whole(tmp_path):
    adapters = tied(targets=["up/kernel"], train=["embedding"])
    peft.save(tmp_path, adapters, TIED, base=TIED_BASE)
    tensors, _ = tensorfile.read(tmp_path / peft.TENSORS)
    assert peft.read_config(tmp_path).ensure_weight_tying
    head, own = (tensors[f"{PREFIX}{x}.weight"] for x in ("lm_head", "model.embed_tokens"))
    np.testing.assert_array_equal(head, own)
    equal(peft.load(tmp_path, TIED_BASE, TIED), adapters)
