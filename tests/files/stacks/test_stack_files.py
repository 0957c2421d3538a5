"""Stacks of adapters in files: one for all or one for each, ours and PEFT's, and damaged ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import mlx, peft
from lora_jax.files.disk import safetensors_file
from lora_jax.files.kinds import detect
from lora_jax.files.naming import Entry, Naming

BASE = {
    "up": jnp.cos(jnp.arange(24.0)).reshape(4, 6),
    "down": jnp.ones((6, 4)),
    "bias": jnp.ones(4),
}
NAMING = Naming(
    (
        Entry("up.weight", "up", "linear"),
        Entry("down.weight", "down", "linear"),
        Entry("down.bias", "bias"),
    )
)
CONFIGS = [
    lora.LoraConfig(rank=1, targets=["up"], dropout=0.1),
    lora.LoraConfig(rank=3, dora=True),
    lora.LoraConfig(rank=2, alpha=5, scaling="rslora", train=["bias"]),
]
NAMES = ["zeta", "a", "my adapter.2"]


def new(i, config):
    moved = lambda x, label: x + 0.5 if label == "train" else x

    @jax.jit
    def made(key):
        params = lora.init(key, BASE, config)
        return lora.split(jax.tree.map(moved, params, lora.labels(params)))[1]

    return made(jax.random.key(i))


ADAPTERS = [new(i, config) for i, config in enumerate(CONFIGS)]
STACK = lora.stack(ADAPTERS, rank=5)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module", params=["all.safetensors", "adapters"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("stack") / request.param
    joined = lora.join(BASE, STACK)
    lora.save(path, joined, {"task": "x"}, config=CONFIGS, names=NAMES)
    return path


def test_what_was_saved_comes_back_to_the_bit(saved):
    equal(lora.load(saved, BASE), STACK)
    equal(lora.load(saved, BASE, names="a"), ADAPTERS[1])
    some = lora.load(saved, lora.join(BASE, STACK), names=["my adapter.2", "zeta"])
    equal(lora.unstack(some), [ADAPTERS[2], ADAPTERS[0]])


def test_another_base_and_other_names_are_refused(saved):
    other = BASE | {"up": BASE["up"] + 1}
    with pytest.raises(lora.AdapterFileError, match=r"up: (.|\n)*"):
        lora.load(saved, other)
    lora.load(saved, BASE | {"bias": jnp.zeros(4)}, names="my adapter.2")  # which replaces the bias
    with pytest.raises(lora.AdapterFileError, match="bias: "):
        lora.load(saved, BASE | {"bias": jnp.zeros(4)}, names=["my adapter.2", "a"])
    with pytest.raises(
        lora.AdapterFileError, match=r"no adapter 'b'; it has zeta, a, my adapter\.2"
    ):
        lora.load(saved, BASE, names=["b"])


def test_files_of_a_directory_are_ordinary_ones(saved, tmp_path):
    if saved.suffix:
        found = lora.read_metadata(saved)
        assert found["names"] == NAMES and found["metadata"] == {"task": "x"}
        assert found["config"]["zeta"]["dropout"] == 0.1
        tensors, _ = safetensors_file.read(saved)
        assert tensors["zeta/up.a"].shape == (4, 1)
        with pytest.raises(lora.AdapterFileError, match=r"a stack of 3 adapters \(zeta, a, my ad"):
            lora.files.native.read_file(saved)
        return
    for name, adapter, config in zip(NAMES, ADAPTERS, CONFIGS, strict=True):
        equal(lora.load(saved / f"{name}.safetensors", BASE), adapter)
        alone = tmp_path / f"{name}.safetensors"
        lora.save(alone, adapter, {"task": "x"}, base=BASE, config=config)
        ours, header = safetensors_file.read(saved / f"{name}.safetensors")
        want, its_header = safetensors_file.read(alone)
        assert header == its_header
        equal(ours, want)
    with pytest.raises(lora.AdapterFileError, match=r"without stack\.json; say by names= which"):
        lora.load(tmp_path, BASE)
    equal(lora.unstack(lora.load(tmp_path, BASE, names=NAMES)), ADAPTERS)
    with pytest.raises(
        lora.AdapterFileError, match=r"several adapters, and one is needed; give one of them: "
    ):
        detect(saved)


def test_one_adapter_of_a_stack_is_saved_without_its_padding(tmp_path):
    lora.save(tmp_path / "one.safetensors", lora.select(STACK, 2), base=BASE)
    equal(lora.load(tmp_path / "one.safetensors", BASE), ADAPTERS[2])
    with pytest.raises(lora.StructureError, match="save: this slot of a stack has no adapter"):
        lora.save(tmp_path / "none.safetensors", lora.select(STACK, -1))


def test_peft_directories(tmp_path):
    lora_only = lora.stack([ADAPTERS[0], ADAPTERS[2]], rank=4)
    peft.save(tmp_path / "p", lora_only, NAMING, base=BASE, names=["z", "b"], config=CONFIGS[::2])
    for name, adapter, config in zip(
        ["z", "b"], [ADAPTERS[0], ADAPTERS[2]], CONFIGS[::2], strict=True
    ):
        peft.save(tmp_path / name, adapter, NAMING, base=BASE, config=config)
        for file in (peft.CONFIG, peft.TENSORS):
            assert (tmp_path / name / file).read_bytes() == (
                tmp_path / "p" / name / file
            ).read_bytes()
    back = peft.load(tmp_path / "p", BASE, NAMING)
    assert jax.tree.structure(back) == jax.tree.structure(lora_only)
    equal(lora.split(lora.join(BASE, back))[1], lora_only)
    one = peft.load(tmp_path / "p", BASE, NAMING, names="b")
    equal(one, ADAPTERS[2])
    (tmp_path / "p" / "stack.json").unlink()  # as PEFT writes several adapters
    equal(lora.unstack(peft.load(tmp_path / "p", BASE, NAMING, names=["b", "z"]))[1], ADAPTERS[0])
    with pytest.raises(lora.AdapterFileError, match=r"adapter_config\.json: no such file"):
        peft.load(tmp_path / "p", BASE, NAMING)


REFUSALS = {
    "names of one": (
        lambda path: lora.save(path, ADAPTERS[0], names=["a"]),
        "save: names are for a stack of adapters, and this is a single one",
    ),
    "too few names": (
        lambda path: lora.save(path, STACK, names=["a"]),
        r"save: names must be a sequence of 3 names, one for each adapter of the stack, got",
    ),
    "a name that is a path": (
        lambda path: lora.save(path, STACK, names=["a", "../b", "c"]),
        r"save: names: '\.\./b' is not the name of a file without a path",
    ),
    "a name twice": (
        lambda path: lora.save(path, STACK, names=["a", "A", "c"]),
        "save: names: two adapters have the same name",
    ),
    "too few configurations": (
        lambda path: lora.save(path, STACK, config=CONFIGS[:2]),
        "save: 2 configurations for 3 adapters",
    ),
    "shapes": (
        lambda path: lora.save(path, jax.eval_shape(lambda: STACK)),
        r"save: these are abstract \(ShapeDtypeStruct\), without values: bias\.value",
    ),
    "NaN": (
        lambda path: lora.save(path, lora.set_scale(STACK, jnp.array([1, jnp.nan, 1]))),
        r"save: NaN or infinite values in down\.scale, up\.scale of adapter 1",
    ),
    "mlx": (
        lambda path: mlx.save(path, STACK, NAMING),
        r"bias: a stack of 3 adapters; take one, unstack\(stack\)\[slot\]",
    ),
    "what PEFT cannot hold": (
        lambda path: peft.save(
            path,
            lora.stack([ADAPTERS[0], ADAPTERS[0]]),
            Naming((Entry("up.weight", "down", "linear"),)),
            names=["a", "b"],
        ),
        r"adapter a of the stack: save: the file cannot hold these adapters:\nup",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_saved_leaves_nothing(name, tmp_path):
    call, message = REFUSALS[name]
    with pytest.raises(lora.LoraError, match=message):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


DAMAGES = {
    "no JSON": (lambda index: "{", "not valid JSON"),
    "other keys": (lambda index: "{}", "must have adapters and rank"),
    "names that are not": (
        lambda index: json.dumps(index | {"adapters": "zeta"}),
        "adapters must be a list of names",
    ),
    "a path": (
        lambda index: json.dumps(index | {"adapters": ["/etc/x"]}),
        "'/etc/x' is not the name of a file",
    ),
    "a rank that is none": (
        lambda index: json.dumps(index | {"rank": -1}),
        "rank must be null or a n",
    ),
    "a rank too small": (lambda index: json.dumps(index | {"rank": 2}), "less than the largest"),
    "a file that is gone": (
        lambda index: json.dumps(index | {"adapters": ["gone"]}),
        r"gone\.safetensors: no such file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index(name, saved, tmp_path):
    damage, message = DAMAGES[name]
    if saved.suffix:
        tensors, header = safetensors_file.read(saved)
        header["stack"] = damage(json.loads(header["stack"]))
        path = tmp_path / "all.safetensors"
        safetensors_file.write(path, tensors, header)
        message = {"a file that is gone": "layouts must be a mapping"}.get(name, message)
    else:
        path = tmp_path
        for file in saved.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        index = json.loads((path / "stack.json").read_text())
        (path / "stack.json").write_text(damage(index))
    with pytest.raises(lora.AdapterFileError, match=message):
        lora.load(path, BASE)
