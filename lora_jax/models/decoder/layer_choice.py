"""Which layers of a config.json see a window, rotate, or have experts.

Those that return names list the type of each layer, `FULL` or `SLIDING`.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.core.checks import is_integer, is_size
from lora_jax.core.foreign import shown_value

FULL, SLIDING = "full_attention", "sliding_attention"
Settings = Mapping[str, Any]


def all_sliding(settings: Settings) -> list[str]:
    return [SLIDING] * count_of(settings)


def of_mistral(settings: Settings) -> list[str]:
    return _given_types(settings) or all_sliding(settings)


def of_exaone4(settings: Settings) -> list[str]:
    if settings.get("sliding_window") is None:
        return [FULL] * count_of(settings)
    return alternating(settings)


def of_qwen(settings: Settings) -> list[str]:
    if not settings.get("use_sliding_window"):
        return [FULL] * count_of(settings)
    if given := _given_types(settings):
        return given
    first, layers = settings.get("max_window_layers", 28), count_of(settings)
    if not is_integer(first):
        raise ValueError(f"config.json: max_window_layers must be an int, got {shown_value(first)}")
    return [SLIDING if i >= first else FULL for i in range(layers)]


def of_qwen3_moe(settings: Settings) -> list[str]:
    return [SLIDING if settings.get("use_sliding_window") else FULL] * count_of(settings)


def of_smollm3(settings: Settings) -> list[str]:
    if given := _given_types(settings):
        return given  # whatever `use_sliding_window` says: the masks of transformers follow these
    if not settings.get("use_sliding_window"):
        return [FULL] * count_of(settings)
    without = unrotated_of_smollm3(settings)
    return [SLIDING if i in without else FULL for i in range(count_of(settings))]


def alternating(settings: Settings) -> list[str]:
    """Return every n-th layer as one that sees all tokens."""
    if given := _given_types(settings):
        return given
    every = settings["sliding_window_pattern"]
    if not is_size(every):
        raise ValueError(
            f"config.json: sliding_window_pattern must be a positive int, got {shown_value(every)}"
        )
    return [SLIDING if (i + 1) % every else FULL for i in range(count_of(settings))]


def _given_types(settings: Settings) -> list[str]:
    types = settings.get("layer_types")
    if not isinstance(types, list) or not types:
        return []
    if unknown := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(
            f"config.json: layer_types has {shown_value(unknown[0])}, which is not one of "
            f"{[FULL, SLIDING]}"
        )
    return types


def unrotated_of_smollm3(settings: Settings) -> tuple[int, ...]:
    """Return the layers without rotation."""
    layers = count_of(settings)
    given, every = settings.get("no_rope_layers"), settings["no_rope_layer_interval"]
    if given is None and is_size(every):
        given = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not set(map(str, given)) <= {"0", "1"}:
        raise ValueError(
            "config.json: no_rope_layers must be a list with 1 for each layer that rotates and 0 "
            "for each that does not"
        )
    return tuple(i for i in range(layers) if not given[i])


def unrotated_of_exaone4(settings: Settings) -> tuple[int, ...]:
    """Return the layers without rotation: those without a window, where there are some with."""
    if settings.get("sliding_window") is None:
        return ()
    return tuple(i for i, name in enumerate(of_exaone4(settings)) if name == FULL)


def without_experts(settings: Settings) -> tuple[int, ...]:
    """Return the numbers of Qwen3-MoE's layers without experts."""
    only, step = settings.get("mlp_only_layers") or [], settings["decoder_sparse_step"]
    if not isinstance(only, list) or not all(map(is_integer, only)):
        raise ValueError(
            f"config.json: mlp_only_layers must be a list of ints, got {shown_value(only)}"
        )
    if not is_size(step):
        raise ValueError(
            f"config.json: decoder_sparse_step must be a positive int, got {shown_value(step)}"
        )
    return tuple(i for i in range(count_of(settings)) if i in {*only} or (i + 1) % step)


def count_of(settings: Settings) -> int:
    """Return the number of layers."""
    layers = settings["num_hidden_layers"]
    if not is_size(layers):
        raise ValueError(
            f"config.json: num_hidden_layers must be a positive int, got {shown_value(layers)}"
        )
    return min(layers, 10**5)  # a larger number exceeds any file, and is refused there
