"""LoraConfig: every field is checked when it is made."""

import dataclasses
import json
import math
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import ConfigError, LoraConfig, Override


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": "16"}, "alpha"),
        ({"targets": 3}, "targets"),
        ({"targets": ("a", 1)}, "targets"),
        ({"targets": "(unclosed"}, "targets.*regular expression"),
        ({"targets": ()}, "targets, train and rows are empty"),
        ({"exclude": 3}, "exclude"),
        ({"train": [None]}, "train"),
        ({"overrides": [("a", 1)]}, "overrides"),
        ({"overrides": {"a": 3}}, r"overrides\['a'\]"),
        ({"overrides": {"a": {"rnak": 3}}}, "rnak"),
        ({"overrides": {"a": {"rank": 0}}}, "overrides: rank"),
        ({"overrides": {"a": {"alpha": math.nan}}}, "overrides: alpha"),
        ({"overrides": {"a": {"layout": "xy"}}}, "overrides: layout"),
        ({"overrides": {"(": {"rank": 1}}}, "regular expression"),
        ({"scaling": "sqrt"}, "scaling"),
        ({"init": "zeros"}, "init"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"bias": "lora_only"}, "bias must be one of .*adapted"),
        ({"layers": []}, "layers is empty"),
        ({"layers": 3}, "layers must be"),
        ({"layers": [True]}, "layers must be"),
        ({"layers": "12"}, "layers must be"),
        ({"layers": slice(0, 4, 0)}, "a step other than 0"),
        ({"layers": slice("a")}, "layers must be a slice of integers"),
        ({"layers_pattern": "block"}, "needs layers= too"),
        ({"layers": [0], "layers_pattern": ""}, "layers_pattern"),
        ({"layers": [0], "layers_pattern": "("}, "layers_pattern.*regular expression"),
        ({"layers": [0], "layers_pattern": r"(a)(\d)"}, "several groups"),
        ({"dtype": None}, "dtype"),
        ({"dtype": "float33"}, "dtype"),
        ({"dtype": jnp.int32}, "dtype"),
        ({"dtype": jnp.float8_e4m3fn}, "dtype"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().rank = 4


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (LoraConfig(rank=8), 1.0),
        (LoraConfig(rank=8, alpha=16), 2.0),
        (LoraConfig(rank=16, alpha=8, scaling="rslora"), 2.0),
        (LoraConfig(rank=16, scaling="rslora"), 4.0),
        (LoraConfig(rank=4, alpha=0), 0.0),
    ],
)
def test_scale(config, scale):
    assert config.for_path("any").scale == scale


def rank_and_scale(config, path):
    chosen = config.for_path(path)
    return chosen.rank, chosen.scale


def test_overrides_exact_path_wins_then_the_first_match():
    config = LoraConfig(
        rank=8,
        alpha=4,
        overrides={
            "query": {"rank": 2},
            r".*/value/kernel": Override(rank=3, alpha=6),
            "b/query/kernel": {"rank": 5, "alpha": 10},
        },
    )
    assert rank_and_scale(config, "b/query/kernel") == (5, 2.0)
    assert rank_and_scale(config, "a/query/kernel") == (2, 2.0)
    assert rank_and_scale(config, "a/value/kernel") == (3, 2.0)
    assert rank_and_scale(config, "a/key/kernel") == (8, 0.5)


def test_overrides_of_a_module_by_its_whole_path_win_over_a_suffix():
    config = LoraConfig(overrides={"query": {"rank": 2}, "b/query": {"rank": 5}, "b": {"rank": 3}})
    ranks = {
        p: config.for_path(p).rank for p in ("b/query/kernel", "a/query/kernel", "b/key/kernel")
    }
    assert ranks == {"b/query/kernel": 5, "a/query/kernel": 2, "b/key/kernel": 3}


def test_numpy_numbers_will_do_and_it_can_be_hashed():
    config = LoraConfig(rank=np.int64(4), alpha=np.float32(2), overrides={"a": {"rank": 1}})
    assert rank_and_scale(config, "b") == (4, 0.5)
    assert json.dumps(config.to_dict())
    assert hash(config) == hash(LoraConfig(rank=4, alpha=2, overrides={"a": {"rank": 1}}))


def test_to_dict_is_json():
    config = LoraConfig(targets=lambda path, leaf: True, overrides={"a": {"rank": 1}}, train=("b",))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["targets"].startswith("<callable")
    assert values["overrides"] == {"a": dataclasses.asdict(Override(rank=1))}
    assert values["dtype"] == "float32" and values["train"] == ["b"]


def test_layers_are_plain_data():
    config = LoraConfig(layers=[np.int64(0), -1], layers_pattern="h")
    assert config.layers == (0, -1)
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [0, -1]
    last = LoraConfig(layers=slice(-4, None))
    assert last.to_dict()["layers"] == {"start": -4, "stop": None, "step": None}
    assert hash(last) == hash(LoraConfig(layers=slice(-4, None))) and last != config


def test_options_of_other_libraries_are_named():
    with pytest.raises(ConfigError) as error:
        LoraConfig(r=8, lora_alpha=16, target_modules=["query"], lora_dropout=0.1, ranks=3, x=1)
    message = str(error.value)
    for name, meant in [
        ("r", "rank;"),
        ("lora_alpha", "alpha;"),
        ("target_modules", "targets;"),
        ("lora_dropout", "dropout;"),
        ("ranks", "rank;"),
        ("x", "one of rank, alpha, targets"),
    ]:
        assert f"for {name} write {meant}" in message
    assert pickle.loads(pickle.dumps(LoraConfig(rank=3))) == LoraConfig(rank=3)
    assert dataclasses.replace(LoraConfig(rank=3), alpha=2.0) == LoraConfig(3, 2.0)
