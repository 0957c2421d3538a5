"""What a PEFT file contains, and adapters that it cannot hold."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, StructureError, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from tests.files.peft.random_adapters import BASE, PREFIX, SHAPES, UP, adapted
from tests.parity.peft import models
from tests.parity.peft.models import PLAIN, SPLIT, STACKED


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


def test_modules_are_named_in_full_where_others_are_not_known(tmp_path):
    """A list of short names would make PEFT adapt the other layers too."""
    adapters = adapted(lora_jax.LoraConfig(rank=2, targets=["1/up/kernel"]))
    part = {UP: BASE[UP]}
    for fold in (False, True):
        peft.save(tmp_path, adapters, PLAIN, base=part, complete=False, fold=fold)
        assert peft.read_config(tmp_path).target_modules == ("model.layers.1.up",)
    peft.save(tmp_path, adapters, PLAIN, base=part)  # the whole model, then
    assert peft.read_config(tmp_path).target_modules == ("up",)
    given = peft.PeftConfig(target_modules=["up"])
    peft.save(tmp_path, adapters, PLAIN, config=given)
    assert peft.read_config(tmp_path).target_modules == ("up",)


def test_a_name_of_one_segment_is_a_regular_expression_without_a_base(tmp_path):
    """A list that has "up" means "layers.0.up" too."""
    params = {"up": {"kernel": jnp.ones((2, 3))}}
    adapters = lora_jax.split(
        lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=1))
    )[1]
    peft.save(tmp_path, adapters, PLAIN)
    written = peft.read_config(tmp_path)
    assert written.target_modules == "up"
    assert written.targets("up") and not written.targets("layers.0.up")


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
        ({"train": ["head/kernel"]}, "head.weight: is fully trained"),
        ({"rows": {"emb": [3]}}, "emb.weight: is fully trained"),
        ({"bias": "adapted"}, "up.bias: is fully trained"),
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
    "nothing": (lambda: {}, {}, "the tree contains no adapters"),
    "no factors": (
        lambda: adapted(lora_jax.LoraConfig(targets=(), train=["head/kernel"])),
        {"base": BASE},
        "no module has LoRA factors",
    ),
    "dora on some": (
        mixed,
        {},
        "only some modules have DoRA; without it: model.layers.1.up.weight",
    ),
    "shapes": (
        lambda: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), up_alone()),
        {},
        "model/layers/1/up/kernel: is abstract",
    ),
    "rows without a base": (
        lambda: up_alone(rows={"emb": [3]}),
        {},
        "emb/embedding: trained rows of an embedding need its shape; pass base=",
    ),
    "a part of a module": (
        lambda: up_alone(train=["head/kernel"]),
        {"base": SHAPES},
        "head.bias: is in a module that is fully trained, so the file needs its value",
    ),
    "another base": (up_alone, {"base": {"up": BASE[UP]}}, "1/up/kernel: not in the base; nearest"),
    "all off": (lambda: lora_jax.disable(up_alone()), {}, "no module has LoRA factors"),
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


@pytest.mark.parametrize("override", [{"rows_axis": 1}, {"layout": "oi"}])
def test_rows_of_a_head(override, tmp_path):
    """They are its outputs, with the axis named or, as before, the layout of a lookup."""
    base = {"up": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    config = lora_jax.LoraConfig(
        rank=1, targets=["up"], rows={"head/kernel": [2, 0]}, overrides={"head/kernel": override}
    )
    params = lora_jax.init(jax.random.key(0), base, config)
    peft.save(tmp_path, params, PLAIN, base=base)
    node = peft.load(tmp_path, base, PLAIN)["head"]["kernel"]
    assert (node.layout.axes, node.axis, node.rows) == ("io", 1, (2, 0))
    np.testing.assert_array_equal(node.value, base["head"]["kernel"][:, [2, 0]].T)


def test_another_layout_than_the_rows(tmp_path):
    nodes = up_alone()
    turned = dataclasses.replace(nodes[UP], layout=lora_jax.Layout("oi"))
    with pytest.raises(StructureError, match="'oi', but its row in the naming is of kind 'lin"):
        peft.save(tmp_path / "new", {UP: turned}, PLAIN)


def test_parts_of_a_fused_module(edited, tmp_path):
    """Query and value have different A's and key has none: one module whose rank is the sum."""
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
    tensors, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    b = tensors[f"{PREFIX}model.layers.1.c_attn.lora_B.weight"]
    assert b.shape == (18, 3) and not b[6:12].any() and not b[:6, 2:].any() and not b[12:, :2].any()
    again = peft.load(tmp_path, base, SPLIT)
    for path, node in adapted_nodes(adapters).items():
        zero = np.zeros(node.shape, "f4")
        want = models.meaning(node, zero)
        np.testing.assert_allclose(models.meaning(again[path], zero), want, rtol=1e-6, atol=1e-6)


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
    """B is zero before training, but A is not padding."""
    nodes = up_alone()
    node = dataclasses.replace(nodes[UP], b=nodes[UP].b.at[1].set(0))
    padded = dataclasses.replace(node, a=node.a.at[:, 1].set(0))
    for one, rank in ((node, 2), (padded, 1)):
        peft.save(tmp_path, {UP: one}, PLAIN)
        assert peft.read_config(tmp_path).r == rank
        assert peft.load(tmp_path, BASE, PLAIN)[UP].rank == rank


def test_magnitudes_of_layers_that_are_off_are_the_bases(edited):
    """If it is switched on by mistake, a layer without an adapter still equals the base."""

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
    names = safetensors_file.headers(tmp_path / peft.TENSORS).tensors
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


def test_modules_whose_names_end_alike_are_saved_along(tmp_path):
    """PEFT matches modules_to_save with any end of a name: "norm" includes "input_norm"."""
    entries = (("norm", "norm"), ("h.0.input_norm", "h/input_norm"))
    naming = lora_jax.naming.Naming(
        (
            *(lora_jax.naming.Entry(f"{a}.weight", f"{b}/scale") for a, b in entries),
            lora_jax.naming.Entry("h.0.up.weight", "h/up/kernel", "linear"),
        )
    )
    base = {"norm/scale": jnp.ones(3), "h/input_norm/scale": jnp.full(3, 2.0)}
    base["h/up/kernel"] = jnp.ones((3, 4))
    config = lora_jax.LoraConfig(rank=1, targets=["up/kernel"], train="norm/scale")
    params = lora_jax.init(jax.random.key(0), base, config)
    peft.save(tmp_path, params, naming)
    tensors, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    assert peft.read_config(tmp_path).modules_to_save == ("h.0.input_norm", "norm")
    np.testing.assert_array_equal(tensors[f"{PREFIX}h.0.input_norm.weight"], np.full(3, 2.0))


def test_rows_that_are_off_are_not_written(edited, tmp_path):
    adapters = peft.load(edited("tokens"), BASE, PLAIN)
    rows = adapters["model/emb/embedding"]
    off = {"model/emb/embedding": dataclasses.replace(rows, scale=jnp.zeros(()))}
    peft.save(tmp_path, adapters | off, PLAIN, base=BASE)
    names = safetensors_file.headers(tmp_path / peft.TENSORS).tensors
    assert names and not any("token_adapter" in name for name in names)
    assert peft.read_config(tmp_path).trainable_token_indices is None
