"""The dropout rate that a file says is the factors', in every format and in both directions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, ConfigError, loralib, mlx, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from tests.files.peft.random_adapters import BASE, adapted
from tests.parity.peft import models
from tests.parity.peft.models import CASES, PLAIN

WIDTH = 64
NAMING = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
KERNELS = {name: {"kernel": jnp.zeros((WIDTH, WIDTH))} for name in ("up", "down")}


def rates(tree):
    nodes = adapted_nodes(tree).values()
    return {node.dropout for node in nodes if isinstance(node, lora_jax.LoraWeight)}


def made(rate):
    config = lora_jax.LoraConfig(rank=2, targets=["up", "down"], dropout=rate)
    return lora_jax.split(lora_jax.init(jax.random.key(0), KERNELS, config))[1]


@pytest.mark.parametrize("case", CASES)
def test_the_rate_is_that_of_pefts_configuration(case, tmp_path):
    folder = models.unpack(case, tmp_path)
    said = json.loads((folder / peft.CONFIG).read_text())["lora_dropout"]
    assert said == 0.1
    for naming, which in ((PLAIN, "plain"), (models.STACKED, "stacked")):
        assert rates(peft.load(folder, models.base(which), naming)) == {said}
    assert rates(peft.load(folder, BASE, PLAIN, dropout=0.25)) == {0.25}


def test_inputs_are_dropped_at_the_rate_of_the_file(tmp_path):
    """With A and B of ones on a diagonal, an output is zero exactly where its input was dropped."""
    eye = np.eye(WIDTH, dtype="f4")
    tensors = {f"base_model.model.up.lora_{x}.weight": eye for x in "AB"}
    safetensors_file.write(tmp_path / peft.TENSORS, tensors)
    config = {"peft_type": "LORA", "r": WIDTH, "lora_alpha": WIDTH, "target_modules": ["up"]}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | {"lora_dropout": 0.5}))
    params = lora_jax.join(KERNELS, peft.load(tmp_path, KERNELS, NAMING))
    apply = lora_jax.lora(lambda p, x: x @ p["up"]["kernel"])
    y = apply(lora_jax.with_dropout(params, jax.random.key(0)), jnp.ones((100, WIDTH)))
    np.testing.assert_array_equal(np.unique(y), [0, 2])  # what is kept is divided by 1 - rate
    assert abs(float((y == 0).mean()) - 0.5) < 0.03  # 5 standard deviations


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("config", [None, peft.PeftConfig(lora_dropout=0.9)])
def test_peft_files_keep_the_rate(fold, config, tmp_path):
    peft.save(tmp_path, made(0.3), NAMING, base=KERNELS, fold=fold, config=config)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["lora_dropout"] == 0.3
    assert rates(peft.load(tmp_path, KERNELS, NAMING)) == {0.3}


def test_mlx_files_keep_the_rate(tmp_path):
    mlx.save(tmp_path, made(0.3), NAMING, base=KERNELS)
    values = json.loads((tmp_path / mlx.CONFIG).read_text())
    assert values["lora_parameters"]["dropout"] == 0.3
    assert rates(mlx.load(tmp_path, KERNELS, NAMING)) == {0.3}
    assert rates(mlx.load(tmp_path, KERNELS, NAMING, dropout=0)) == {0.0}
    del values["lora_parameters"]["dropout"]
    (tmp_path / mlx.CONFIG).write_text(json.dumps(values))
    assert rates(mlx.load(tmp_path, KERNELS, NAMING)) == {0.0}
    for wrong in (1, -0.1, "0.1", True, None, [0.1]):
        values["lora_parameters"]["dropout"] = wrong
        (tmp_path / mlx.CONFIG).write_text(json.dumps(values))
        with pytest.raises(AdapterFileError, match="dropout must be a rate"):
            mlx.load(tmp_path, KERNELS, NAMING)


def test_loralibs_rate_is_an_argument(tmp_path):
    one = {"up.lora_A": np.ones((2, WIDTH), "f4"), "up.lora_B": np.ones((WIDTH, 2), "f4")}
    safetensors_file.write(tmp_path / "a.safetensors", one)
    load = lambda **given: loralib.load(
        tmp_path / "a.safetensors", KERNELS, NAMING, alpha=2, **given
    )
    assert rates(load()) == {0.0} and rates(load(dropout=0.3)) == {0.3}
    with pytest.raises(ConfigError, match="dropout must be a probability"):
        load(dropout=1)


@pytest.mark.parametrize("save", [peft.save, mlx.save])
def test_several_rates_are_told(save, tmp_path):
    with pytest.warns(UserWarning, match=r"gets 0.3, that of most.*down/kernel \(0.4\)") as caught:
        config = lora_jax.LoraConfig(rank=2, targets=["up", "down", "out"], dropout=0.3)
        base = KERNELS | {"out": {"kernel": jnp.zeros((WIDTH, 3))}}
        nodes = lora_jax.split(lora_jax.init(jax.random.key(0), base, config))[1]
        nodes["down"]["kernel"] = dataclasses.replace(nodes["down"]["kernel"], dropout=0.4)
        save(tmp_path, nodes, NAMING, base=base)
    assert caught[0].filename == __file__


def test_a_rate_of_one_is_told(tmp_path):
    """PEFT accepts it, but nothing would train; the values serve at another rate."""
    peft.save(tmp_path, adapted(lora_jax.LoraConfig(rank=2, targets=["up/kernel"])), PLAIN)
    values = json.loads((tmp_path / peft.CONFIG).read_text()) | {"lora_dropout": 1.0}
    (tmp_path / peft.CONFIG).write_text(json.dumps(values))
    with pytest.raises(AdapterFileError, match=r"the dropout is 1.0; pass dropout="):
        peft.load(tmp_path, BASE, PLAIN)
    assert rates(peft.load(tmp_path, BASE, PLAIN, dropout=0.1)) == {0.1}
    with pytest.warns(UserWarning, match=r"the dropout is 1.0"):
        assert rates(peft.load(tmp_path, BASE, PLAIN, strict=False)) == {0.0}
