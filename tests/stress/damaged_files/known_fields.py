"""The fields that each format knows, in the files or not, and wrong values to put into them."""

import copy
from random import Random
from typing import Any

STEERING = "a\x1b[2J\x07\x00\u202eb\u200f"  # clears the screen, rings, turns the line around


class Verbatim(str):
    """JSON that is written as it is."""


#: Of every JSON type, small and extreme.
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 10**6, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64),
    *(10**30, 10**400, -(10**400), Verbatim("9" * 5000), Verbatim("-" + "1" * 5000)),
    *(0.5, -0.5, -0.0, 1e-9, 1e-320, 1e38, 1e39, 1e308, -1e308, 3.0000001),
    *(Verbatim("1e400"), Verbatim("-1e999"), Verbatim("1" + "0" * 400 + ".5")),
    *(float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "nan", "lora", "io", "F32"),
    *("float32", "foo", "V8", "O", "int99", "../../etc/passwd", "/dev/zero", "a/b", ".", ".."),
    *(STEERING, "\0", "\ud800", "*", "(", "[a-z", "(?P<x>", "x" * 300, "y" * 5000, "é", "日本"),
    *([], {}, [0], [1, 2, 3], [-1], [[]], ["a"], [None], [0.5], [10**400], ["\ud800"], [{}]),
    *({"a": 1}, {"": {}}, {"a": []}, {STEERING: 1}, {"content": 5}, {"factor": "x"}),
    *([0] * 100, [True, False], [""] * 3, [[1, 2], [3]], {"type": "yarn"}, {"name": 0}),
)


def wrong(rng: Random) -> Any:
    """Return a wrong value of its own, which may be changed further."""
    return copy.deepcopy(rng.choice(WRONG))


Path = tuple[str, ...]
_ROPE = ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor")
_ROPE = (*_ROPE, "original_max_position_embeddings", "partial_rotary_factor")
#: Fields that readers look at, by the name of the file; those already in a file are known anyway.
FIELDS: dict[str, tuple[Path, ...]] = {
    "config.json": (
        *((x,) for x in ("model_type", "vocab_size", "hidden_size", "intermediate_size")),
        *((x,) for x in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
        *((x,) for x in ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")),
        *((x,) for x in ("rope_scaling", "rope_parameters", "hidden_act", "attention_bias")),
        *((x,) for x in ("tie_word_embeddings", "mlp_bias", "sliding_window", "layer_types")),
        *((x,) for x in ("use_sliding_window", "max_window_layers", "quantization_config")),
        *((x,) for x in ("layer_norm_eps", "type_vocab_size", "position_embedding_type")),
        *((x,) for x in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")),
        *(("rope_scaling", x) for x in _ROPE),
        *(("rope_parameters", x) for x in _ROPE),
    ),
    "adapter_config.json": (
        *((x,) for x in ("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules")),
        *((x,) for x in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")),
        *((x,) for x in ("bias", "fan_in_fan_out", "modules_to_save", "layers_to_transform")),
        *((x,) for x in ("layers_pattern", "trainable_token_indices", "target_parameters")),
        *((x,) for x in ("init_lora_weights", "lora_dropout", "base_model_name_or_path")),
        *(
            (x,)
            for x in ("task_type", "revision", "megatron_config", "loftq_config", "auto_mapping")
        ),
        *((x,) for x in ("fine_tune_type", "num_layers", "model", "lora_parameters")),
        *(("lora_parameters", x) for x in ("rank", "scale", "dropout", "keys", "alpha")),
    ),
    "tokenizer_config.json": (
        *((f"{x}_token",) for x in ("bos", "eos", "pad", "unk")),
        *((f"{x}_token", "content") for x in ("bos", "eos", "pad")),
        *((x,) for x in ("chat_template", "model_max_length", "added_tokens_decoder")),
        *((x,) for x in ("add_bos_token", "add_eos_token", "tokenizer_class")),
    ),
    "tokenizer.json": (
        *((x,) for x in ("version", "truncation", "padding", "added_tokens", "normalizer")),
        *((x,) for x in ("pre_tokenizer", "post_processor", "decoder", "model")),
        *(("model", x) for x in ("type", "vocab", "merges", "dropout", "unk_token")),
        *(("model", x) for x in ("ignore_merges", "byte_fallback", "fuse_unk", "unk_id")),
        *(("model", x) for x in ("continuing_subword_prefix", "end_of_word_suffix")),
        *(("truncation", x) for x in ("max_length", "strategy", "stride", "direction")),
    ),
    "generation_config.json": tuple((f"{x}_token_id",) for x in ("bos", "eos", "pad")),
    "model.safetensors.index.json": (("weight_map",), ("metadata",), ("metadata", "total_size")),
    "stack.json": (("adapters",), ("rank",)),
    "run.json": (("settings",), ("base",), ("data",), ("data", "training"), ("data", "held-out")),
    "_METADATA": (
        *((x,) for x in ("tree_metadata", "use_ocdbt", "use_zarr3", "custom_metadata")),
        *((x,) for x in ("store_array_data_equal_to_fill_value", "value_metadata_tree")),
    ),
    "_CHECKPOINT_METADATA": (
        *((x,) for x in ("item_handlers", "metrics", "performance_metrics", "custom_metadata")),
        *((x,) for x in ("init_timestamp_nsecs", "commit_timestamp_nsecs")),
        *(("custom_metadata", x) for x in ("step",)),
    ),
}


def paths_in(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Return the path of every value within a JSON value."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:50])
    else:
        return []
    return [p for k, x in items for p in ((*prefix, k), *paths_in(x, (*prefix, k)))]


def put(value: Any, path: tuple, new: Any) -> None:
    """Put a value at a path, through whatever has to be made or replaced on the way."""
    for key in path[:-1]:
        inner = value[key] if isinstance(key, int) else value.get(key)
        if not isinstance(inner, dict | list) or (isinstance(inner, list) and not inner):
            inner = {}
            value[key] = inner
        value = inner
    if isinstance(value, list) and not isinstance(path[-1], int):
        return
    value[path[-1]] = new


def wrong_fields(name: str, value: Any, rng: Random) -> Any:
    """Put wrong values into one to three of the fields that a file of this name may have."""
    if not isinstance(value, dict | list):
        return wrong(rng)
    known = list(FIELDS.get(name, ()))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        here = paths_in(value)
        pool = known if known and (not here or rng.random() < 0.5) else here
        if not pool:
            return wrong(rng)
        path = rng.choice(pool)
        try:
            put(value, path, wrong(rng))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier value took the place of what the path leads through
    return value
