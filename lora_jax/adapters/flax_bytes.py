"""Adapted and quantized nodes for `flax.serialization`, where a program uses it."""

import dataclasses
import sys
from typing import Any

from lora_jax.core.quantized.weight import QuantizedWeight
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows


def register() -> None:
    """Make the nodes known to `flax.serialization`, if it has been imported.

    `to_bytes` writes their arrays by name; `from_bytes` fills the nodes of its target.
    """
    flax = sys.modules.get("flax.serialization")
    if flax is None or _registered:
        return
    _registered.append(flax)
    for node in (LoraWeight, TrainedLeaf, TrainedRows, QuantizedWeight):
        flax.register_serialization_state(node, _to_state(flax), _from_state(flax))


_registered: list[Any] = []


def _leaves(node: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(node) if "static" not in f.metadata]


def _to_state(flax: Any) -> Any:
    def to_state(node: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(node, name)) for name in _leaves(node)}

    return to_state


def _from_state(flax: Any) -> Any:
    def from_state(node: Any, state: dict[str, Any]) -> Any:
        fields = {
            name: flax.from_state_dict(getattr(node, name), state[name], name=name)
            for name in _leaves(node)
            if name in state or getattr(node, name) is not None  # older bytes lack a field
        }
        return dataclasses.replace(node, **fields)

    return from_state
