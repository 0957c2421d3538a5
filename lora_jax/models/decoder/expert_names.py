"""The tensors of experts and their routers in Hugging Face's files.

The files of Mixtral and Qwen3-MoE have a linear layer per expert, and so do the adapters that PEFT
trained with transformers 4. In transformers 5 all experts of a layer are one parameter, gate and up
together, which PEFT adapts by `target_parameters`; gpt-oss is stored like that too.
"""

import re
from collections.abc import Callable, Collection, Iterator

from lora_jax.files.naming import Entry
from lora_jax.models.weights.linear_entries import linear_entries

#: Yields the entries of one layer: the module of a layer, our path of it, whether it is stacked.
LayerNames = Callable[[str, str, bool], Iterator[Entry]]


def of_modules(experts: str, router: str, gate: str, up: str, down: str) -> LayerNames:
    """Return the names of a linear layer per expert, `{experts}.{e}.{gate}.weight`."""

    def names(torch: str, path: str, stacked: bool) -> Iterator[Entry]:
        yield from linear_entries(f"{torch}.{router}", f"{path}/router", stacked)
        axes = "o i -> n e i o" if stacked else "o i -> e i o"
        for name, ours in {gate: "gate", up: "up", down: "down"}.items():
            yield Entry(
                f"{torch}.{experts}.{{e}}.{name}.weight",
                f"{path}/experts/{ours}/kernel",
                "linear",
                axes,
            )

    return names


def of_parameters(torch: str, path: str, stacked: bool) -> Iterator[Entry]:
    """Yield the names in transformers 5 of Mixtral's and Qwen3-MoE's experts."""
    yield from linear_entries(f"{torch}.gate", f"{path}/router", stacked)
    axes = "e o i -> n e i o" if stacked else "e o i -> e i o"
    at = lambda name: f"{path}/experts/{name}/kernel"
    yield Entry(f"{torch}.experts.gate_up_proj", (at("gate"), at("up")), "experts", axes)
    yield Entry(f"{torch}.experts.down_proj", at("down"), "experts", axes)


def of_gpt_oss(torch: str, path: str, stacked: bool) -> Iterator[Entry]:
    """Yield the names of gpt-oss' experts; of MXFP4's blocks too, once they are read."""
    yield from linear_entries(f"{torch}.router", f"{path}/router", stacked)
    axes = "e i o -> n e i o" if stacked else "e i o -> e i o"
    for name, ours in {"gate_up_proj": "gate_up", "down_proj": "down"}.items():
        leaf = f"{path}/experts/{ours}"
        yield Entry(f"{torch}.experts.{name}", f"{leaf}/kernel", "experts_transposed", axes)
        bias = "e o -> n e o" if stacked else "e o -> e o"
        yield Entry(f"{torch}.experts.{name}_bias", f"{leaf}/bias", "", bias)


def has_modules(names: Collection[str]) -> bool:
    """Return whether a file has a module for each expert."""
    return any(re.search(r"\.experts\.\d+\.", name) for name in names)


#: Mixtral's layers in files.
MIXTRAL = of_modules("experts", "gate", "w1", "w3", "w2")
#: Qwen3-MoE's layers in files.
QWEN_MOE = of_modules("experts", "gate", "gate_proj", "up_proj", "down_proj")
