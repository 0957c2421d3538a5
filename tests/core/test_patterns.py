"""An entry that names a leaf and a module: the leaf is selected, and the user is told."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core.patterns import select
from lora_jax.core.tree import adapted_nodes

PARAMS = {
    "latents": {"query": jnp.ones((5, 4))},
    "attn": {"query": {"kernel": jnp.ones((4, 4))}, "value": {"kernel": jnp.ones((4, 4))}},
}


def init(**fields):
    config = lora_jax.LoraConfig(rank=1, **fields)
    return adapted_nodes(lora_jax.init(jax.random.key(0), PARAMS, config)).keys()


@pytest.mark.parametrize("field", ["targets", "exclude", "train"])
def test_a_leaf_that_wins_over_a_module_is_told(field):
    targets = {} if field == "targets" else {"targets": ["value"]}
    told = (
        f"^{field}: 'query' selects the leaf latents/query, which wins over the module attn/query; "
        "for that, name a leaf in it: query/kernel$"
    )
    with pytest.warns(UserWarning, match=told) as caught:
        found = init(**targets, **{field: ["query"]})
    assert [warning.filename for warning in caught] == [__file__]
    assert "attn/query/kernel" not in found
    assert ("latents/query" in found) == (field != "exclude")


def test_names_that_mean_one_thing_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert init(targets=["query/kernel", "value"]) == {"attn/query/kernel", "attn/value/kernel"}
        assert init(targets=["latents/query"]) == {"latents/query"}
        assert init(targets=["kernel"]) == {"attn/query/kernel", "attn/value/kernel"}
        leaves = {"query/kernel": 0, "query/bias": 0}
        assert select("targets", ["query"], leaves).keys() == leaves.keys()
