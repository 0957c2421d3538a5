"""Native adapter files: complete or absent, strict about the base, and hard to fool."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import AdapterFileError, LoraConfig, StructureError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.disk.fingerprint import fingerprint, parse_entry
from tests.programs import normal, randomize

KEY = jax.random.key(0)
BASE = {
    "up": {"kernel": normal(1, (7, 9), jnp.float32), "bias": jnp.zeros(9)},
    "stack": normal(2, (3, 9, 5), jnp.bfloat16),
    "count": jnp.int32(3),
}
CONFIG = LoraConfig(
    rank=2,
    alpha=3,
    targets=["up/kernel", "stack"],
    train=["bias"],
    dropout=0.1,
    overrides={"stack": {"layout": "bio"}},
)
JOINED = randomize(lora_jax.init(KEY, BASE, CONFIG))
ADAPTERS = lora_jax.split(JOINED)[1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora_jax.save(path, JOINED, {"task": "test", "steps": 3}, config=CONFIG)
    return path


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)


def test_round_trip(file):
    same(lora_jax.load(file, BASE), ADAPTERS)
    same(lora_jax.load(file, JOINED), ADAPTERS)  # its base counts


def test_overlay_with_and_without_its_base(tmp_path):
    lora_jax.save(tmp_path / "a", ADAPTERS, base=BASE)
    lora_jax.save(tmp_path / "b", ADAPTERS)
    for name in "ab":
        same(lora_jax.load(tmp_path / name, BASE), ADAPTERS)
    assert lora_jax.read_metadata(tmp_path / "a")["base"]
    assert not lora_jax.read_metadata(tmp_path / "b")["base"]


def test_bfloat16_factors(tmp_path):
    config = LoraConfig(rank=2, targets=["up/kernel"], dtype=jnp.bfloat16)
    joined = randomize(lora_jax.init(KEY, BASE, config))
    lora_jax.save(tmp_path / "a", joined)
    same(lora_jax.load(tmp_path / "a", BASE), lora_jax.split(joined)[1])


def test_metadata(file):
    header = lora_jax.read_metadata(file)
    assert header["metadata"] == {"task": "test", "steps": 3}
    assert header["config"]["rank"] == 2 and header["config"]["alpha"] == 3
    assert header["layouts"]["stack"]["axes"] == "bio"


def test_a_names_suffix_like_ours_survives(tmp_path):
    base = {"x.a": {"scale": jnp.ones((4, 3))}, "b.value": jnp.ones((3, 4))}
    joined = randomize(lora_jax.init(KEY, base, LoraConfig(rank=1)))
    lora_jax.save(tmp_path / "a", joined)
    same(lora_jax.load(tmp_path / "a", base), lora_jax.split(joined)[1])


def test_another_base_is_refused_leaf_by_leaf(file):
    other = {**BASE, "up": {**BASE["up"], "kernel": BASE["up"]["kernel"].at[3, 4].add(1e-3)}}
    with pytest.raises(AdapterFileError) as error:
        lora_jax.load(file, other)
    assert "up/kernel: other values" in str(error.value) and "stack" not in str(error.value)


def test_a_leaf_that_is_trained_whole_may_differ(file):
    other = {**BASE, "up": {**BASE["up"], "bias": jnp.ones(9)}}
    same(lora_jax.load(file, other), ADAPTERS)


def test_all_structural_differences_at_once(file):
    other = {"up": {"kernel": jnp.zeros((7, 8)), "biass": jnp.zeros(9)}, "stack": jnp.zeros((3, 9))}
    with pytest.raises(AdapterFileError) as error:
        lora_jax.load(file, other)
    message = str(error.value)
    assert "up/kernel: b is (2, 9)" in message
    assert "up/bias: not in this base; nearest paths: up/biass" in message
    assert "stack: layout 'bio'" in message


def test_other_shapes_and_dtypes_elsewhere_in_the_base(file):
    other = {**BASE, "count": jnp.float32(3), "more": jnp.zeros(2)}
    with pytest.raises(AdapterFileError) as error:
        lora_jax.load(file, other)
    assert "count: is float32[]" in str(error.value) and "more: not in the adapters'" in str(
        error.value
    )


def test_an_abstract_base_is_compared_by_shape(file):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BASE)
    same(lora_jax.load(file, shapes), ADAPTERS)


def test_missing_and_surplus_tensors_are_listed_together(file):
    _, header = safetensors_file.read(file)
    tensors = load_file(file)
    del tensors["up/kernel.a"]
    tensors["up/kernel.c"] = np.zeros(3)
    save_file(tensors, file, header)
    with pytest.raises(AdapterFileError) as error:
        lora_jax.load(file, BASE)
    assert "up/kernel.a" in str(error.value) and "up/kernel.c: this tensor belongs to no" in str(
        error.value
    )


def corrupt(data: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "text":
        return b"this is no adapter at all, but some text that someone wrote"
    if how == "truncated":
        return data[:-10]
    if how == "half":
        return data[: len(data) // 2]
    if how == "huge header":
        return (2**40).to_bytes(8, "little") + data[8:]
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "half", "huge header"])
def test_files_that_are_not_whole_safetensors(file, how):
    file.write_bytes(corrupt(file.read_bytes(), how))
    with pytest.raises(AdapterFileError, match=r"adapter\.safetensors: not a complete safetensors"):
        lora_jax.load(file, BASE)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"format": "pt"}, "not one that lora_jax"),
        (None, "not one that lora_jax"),
        ({"format": "lora_jax", "version": "99"}, "version '99' is not"),
        ({"format": "lora_jax", "version": "1"}, "damaged"),
        ({"layouts": "[]"}, "damaged"),
        ({"layouts": "{"}, "damaged"),
        ({"layouts": json.dumps({"up/kernel": {"kind": "vera"}})}, "unknown kind"),
        ({"layouts": json.dumps({"up/kernel": {"kind": "lora", "axes": "xx", "uses": []}})}, "xx"),
        ({"layouts": json.dumps({"up/kernel": {"kind": "lora"}})}, "axes"),
    ],
)
def test_foreign_and_damaged_headers(file, header, match):
    _, good = safetensors_file.read(file)
    if header and "format" not in header:
        header = {**good, **header}
    save_file(load_file(file), file, header)
    with pytest.raises(AdapterFileError, match=match):
        lora_jax.load(file, BASE)


def edited(file, path, **fields):
    """Replace fields of one layout in the file; None removes a field."""
    tensors, header = safetensors_file.read(file)
    layouts = json.loads(header["layouts"])
    record = {**layouts[path], **fields}
    layouts[path] = {key: value for key, value in record.items() if value is not None}
    safetensors_file.write(file, tensors, {**header, "layouts": json.dumps(layouts)})


@pytest.mark.parametrize(
    ("path", "field", "values", "match"),
    [
        ("stack", "kind", ["x", 3, [], {}, True], "unknown kind"),
        ("stack", "kind", ["dora"], r"missing: stack\.magnitude"),
        ("stack", "kind", ["whole"], r"missing: stack\.value"),
        ("stack", "axes", ["", "xyz", "bii", "i" * 99, 3, ["b", "i", "o"], None], "layout|axes"),
        ("stack", "axes", ["io", "bbio", "ooii"], "axes, but layout|does not fit"),
        ("stack", "uses", ["dot", 3, [3], [[]], None], "uses must be"),
        ("stack", "dropout", [1, -0.5, "0.1", True, 1e300, [], {}], "dropout must be"),
        ("rows", "rows", [3, "1", [], [-1], [1.0], [True], [1, 1], [2**40], None], "rows must be"),
        ("rows", "rows", [[1], [1, 2, 3]], "the base .* needs"),
        ("rows", "rows", [[1, 99]], "beyond the base"),
        ("rows", "axes", ["ii", "oo", "iio", "biio"], "axis must|layout"),
        ("rows", "axis", [2, -1, True, "0", [0], {}, 1.0], "axis must"),
        ("stack", "lookup_only", [1, "yes", []], "lookup_only must"),
    ],
)
def test_layouts_of_the_wrong_type_or_value(tmp_path, path, field, values, match):
    base = {**BASE, "rows": jnp.ones((7, 3))}
    config = LoraConfig(
        rank=2,
        targets=["stack"],
        rows={"rows": [1, 4]},
        dropout=0.1,
        overrides={"stack": {"layout": "bio"}, "rows": {"layout": "io"}},
    )
    joined = lora_jax.init(KEY, base, config)
    for value in values:
        lora_jax.save(tmp_path / "a", joined)
        edited(tmp_path / "a", path, **{field: value})
        with pytest.raises(AdapterFileError, match=rf"{path}.*({match})"):
            lora_jax.load(tmp_path / "a", base)


def test_files_from_before_the_axis_still_load(tmp_path):
    """The rows lay along the layout's one in axis; "oi" was how a head's layout was named."""
    base, file = {"head": jnp.arange(15.0).reshape(3, 5)}, tmp_path / "a"
    config = LoraConfig(targets=(), rows={"head": [4, 1]}, overrides={"head": {"layout": "oi"}})
    params = lora_jax.init(KEY, base, config)
    lora_jax.save(file, params)
    edited(file, "head", axis=None)
    assert "axis" not in lora_jax.read_metadata(file)["layouts"]["head"]
    loaded = lora_jax.load(file, base)
    assert jax.tree.structure(loaded) == jax.tree.structure(lora_jax.split(params)[1])
    assert loaded["head"].axis == 1
    np.testing.assert_array_equal(loaded["head"].value, base["head"][:, [4, 1]].T)
    edited(file, "head", axis=None, axes="iio")
    with pytest.raises(AdapterFileError, match="rows need a layout with one in axis"):
        lora_jax.load(file, base)


def test_a_layout_of_lookups_alone_comes_back(tmp_path):
    params = lora_jax.init(KEY, BASE, LoraConfig(rank=2, targets=["up/kernel"]))
    node = params["up"]["kernel"]
    node = dataclasses.replace(node, layout=lora_jax.Layout("io", lookup_only=True))
    lora_jax.save(tmp_path / "a", {**params, "up": {**params["up"], "kernel": node}})
    assert lora_jax.load(tmp_path / "a", BASE)["up"]["kernel"].layout == node.layout


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("layouts", '{"up/kernel": NaN}', "layouts: not valid JSON"),
        ("layouts", '{"stack": 1, "stack": 2}', "'stack' appears twice"),
        ("layouts", "[" * 100_000, "layouts: the JSON is nested too deeply"),
        ("base", '{"stack": 3}', "fingerprint in base"),
        ("base", "[]", "must be a mapping: base"),
        ("config", "3", "must be a mapping: config"),
        ("metadata", "null", "must be a mapping: metadata"),
    ],
)
def test_header_values_of_the_wrong_type(file, field, value, match):
    tensors, header = safetensors_file.read(file)
    safetensors_file.write(file, tensors, {**header, field: value})
    for read in (lora_jax.read_metadata, lambda file: lora_jax.load(file, BASE)):
        with pytest.raises(AdapterFileError, match=rf"the header is damaged: .*{match}"):
            read(file)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("stack.a", lambda x: x.astype(np.int32), "stack: a is int32, not floating"),
        ("stack.a", lambda x: x.astype(np.float64), "a is float64, which JAX supports only with"),
        ("stack.a", lambda x: x[..., :0], "the rank is 0"),
        ("stack.a", lambda x: x[0, 0, 0], "a has 0 axes"),
        ("stack.b", lambda x: x[:, :1], "b is .* needs"),
        ("stack.scale", lambda x: x[:1], "scale is .* needs"),
        ("up/bias.scale", lambda x: x.reshape(1, 1), "scale has shape"),
        ("up/bias.value", lambda x: x[:3], "trained .*, base"),
        ("up/kernel.a", lambda x: x * np.nan, r"NaN or infinite values in:\n'up/kernel\.a'$"),
        ("stack.scale", lambda x: x * np.inf, r"NaN or infinite values in:\n'stack\.scale'$"),
    ],
)
def test_tensors_of_the_wrong_dtype_shape_or_value(file, name, change, match):
    tensors, header = safetensors_file.read(file)
    safetensors_file.write(file, {**tensors, name: change(tensors[name])}, header)
    with pytest.raises(AdapterFileError, match=match):
        lora_jax.load(file, BASE)


def test_a_message_is_neither_endless_nor_able_to_steer_a_terminal(file):
    tensors, header = safetensors_file.read(file)
    layouts = {f"\x1b[31m{'x' * 5000}{i}": {"kind": "lora"} for i in range(3000)}
    safetensors_file.write(file, tensors, {**header, "layouts": json.dumps(layouts)})
    with pytest.raises(AdapterFileError, match=r"and \d+ more") as error:
        lora_jax.load(file, BASE)
    assert len(str(error.value)) < 100_000 and "\x1b" not in str(error.value)


def test_values_that_could_not_be_loaded_are_not_saved(tmp_path):
    bad = jax.tree.map(lambda x: x, ADAPTERS)
    bad["up"]["kernel"] = dataclasses.replace(bad["up"]["kernel"], a=jnp.full((7, 2), jnp.nan))
    with pytest.raises(StructureError, match=r"save: NaN or infinite values in up/kernel\.a$"):
        lora_jax.save(tmp_path / "a", bad)
    assert not os.listdir(tmp_path)


def test_no_such_file_and_a_directory(tmp_path):
    with pytest.raises(AdapterFileError, match="no such file"):
        lora_jax.load(tmp_path / "none", BASE)
    with pytest.raises(AdapterFileError):
        lora_jax.load(tmp_path, BASE)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_jax.save(file, JOINED)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_save_refuses(tmp_path):
    with pytest.raises(StructureError, match="no adapters"):
        lora_jax.save(tmp_path / "a", BASE)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), JOINED)
    with pytest.raises(StructureError, match=r"without values: .*up/kernel\.a"):
        lora_jax.save(tmp_path / "a", shapes)
    with pytest.raises(StructureError, match="up/kernel: not in the base"):
        lora_jax.save(tmp_path / "a", ADAPTERS, base={"other": jnp.ones(3)})
    with pytest.raises(TypeError):
        lora_jax.save(tmp_path / "a", JOINED, {"key": object()})
    assert not os.listdir(tmp_path)


def test_fingerprint_sees_values_order_dtype_and_shape():
    x = jnp.arange(6.0)
    prints = [
        fingerprint({"x": y})["x"]
        for y in (
            x,
            x.at[2].add(1),
            x[::-1],
            x.at[jnp.array([0, 1])].set(x[jnp.array([1, 0])]),
            x.reshape(2, 3),
            x.astype(jnp.bfloat16),
            x.astype(jnp.int32),
            x.astype(bool),
            x.astype(jnp.complex64),
            x.astype(jnp.int4),
            x.astype(jnp.float8_e4m3fn),
            jax.random.key(0),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"x": x})["x"] == prints[0] == fingerprint({"x": np.asarray(x)})["x"]


@pytest.mark.parametrize(
    "entry",
    ["foo[4,3]", "V8[4,3]", "O[4,3]", "int99[4,3]", "str[1]", "float32[" + "9" * 5000 + "]"],
)
def test_a_base_of_no_dtype_or_of_absurd_sizes(entry):
    assert parse_entry(entry + ":1a2b3c4d5e6f7a8b") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "bool", "uint4"])
def test_a_base_of_any_dtype_of_jax(dtype):
    assert parse_entry(f"{dtype}[4,3]") == jax.ShapeDtypeStruct((4, 3), dtype)


@pytest.mark.parametrize(
    ("saved", "asked", "told"),
    [
        ("inner", "outer", r"2 paths, such as a/kernel, are in the base's params/model/: load"),
        ("outer", "inner", r"2 paths, such as params/model/a/kernel, begin with params/model/, "),
    ],
)
def test_a_module_around_all_paths_is_one_line(saved, asked, told, tmp_path):
    inner = {name: {"kernel": jnp.ones((4, 3))} for name in "ab"}
    trees = {"inner": inner, "outer": {"params": {"model": inner}}}
    params = lora_jax.init(jax.random.key(0), trees[saved], lora_jax.LoraConfig(rank=1))
    lora_jax.save(tmp_path / "a.safetensors", params)
    with pytest.raises(AdapterFileError, match=told) as caught:
        lora_jax.load(tmp_path / "a.safetensors", trees[asked])
    assert len(str(caught.value).splitlines()) == 2
    if saved == "outer":
        assert str(caught.value).endswith("load the file on {'params': {'model': base}}")
    lora_jax.load(tmp_path / "a.safetensors", trees[saved])
