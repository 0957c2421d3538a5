"""An embedding that is also the output head: one leaf here, two modules in PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdapterFileError, StructureError, peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from tests.files.peft.random_adapters import PREFIX, equal

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
    tensors, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    for copy, own in (("A", "B"), ("B", "A")):
        own = tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{own}"]
        np.testing.assert_array_equal(tensors[f"{PREFIX}lm_head.lora_{copy}.weight"], own.T)
    equal(peft.load(tmp_path, TIED_BASE, TIED), adapters)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] += 1
    safetensors_file.write(tmp_path / peft.TENSORS, tensors)
    with pytest.raises(
        AdapterFileError,
        match=r"lm_head.lora_A.weight: differs from the embed",
    ):
        peft.load(tmp_path, TIED_BASE, TIED)
    with pytest.raises(StructureError, match="pass base=, which shows whether the head"):
        peft.save(tmp_path, adapters, TIED)


def test_an_embedding_adapted_as_a_lookup_alone_does_not_fit_a_tied_tree(tmp_path):
    untied = TIED_BASE | {"head/kernel": jnp.ones((3, 5))}
    adapters = tied(targets=["embedding", "up/kernel"])
    peft.save(tmp_path, adapters, TIED, base=untied)
    assert not peft.read_config(tmp_path).ensure_weight_tying
    assert adapted_nodes(peft.load(tmp_path, untied, TIED)).keys() == TIED_BASE.keys()
    with pytest.raises(AdapterFileError, match="adapts only the lookup"):
        peft.load(tmp_path, TIED_BASE, TIED)


def test_a_tied_embedding_saved_whole(tmp_path):
    adapters = tied(targets=["up/kernel"], train=["embedding"])
    peft.save(tmp_path, adapters, TIED, base=TIED_BASE)
    tensors, _ = safetensors_file.read(tmp_path / peft.TENSORS)
    assert peft.read_config(tmp_path).ensure_weight_tying
    head, own = (tensors[f"{PREFIX}{x}.weight"] for x in ("lm_head", "model.embed_tokens"))
    np.testing.assert_array_equal(head, own)
    equal(peft.load(tmp_path, TIED_BASE, TIED), adapters)
