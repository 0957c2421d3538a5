"""Tell in one line that the names in a PEFT file have a prefix that the base's have not."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_jax.files.peft import tensor_names
from lora_jax.files.peft.adapter_file import PeftFile
from lora_jax.files.peft.read import read_contents
from lora_jax.files.torch_adapters.contents import TorchBase, module_of
from lora_jax.files.torch_adapters.rename import Rule, describe, find_rules, prefix_rules, rename

_START = tensor_names.PREFIX.rstrip(".")
#: The name of the adapter, which PEFT itself leaves out of its files: "lora_A.default.weight".
_ADAPTER = re.compile(
    r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|"
    r"trainable_tokens_delta)\.(?!weight$|bias$|lora_|base_layer\.)(\w+)(?:\.|$)"
)


def tell_wrong_names(file: PeftFile, model: TorchBase, problems: list[str]) -> list[str]:
    """Return the problems with one line in place of those that other names would solve."""
    if not problems:
        return problems
    names = list(file.tensors)
    experts = {module_of(name): name for name in model.experts()}
    weight_of = lambda name: _weight(name, names, model, experts)
    own = lambda lost: _candidates(lost, [weight_of(name) for name in lost], model)
    rules = find_rules(names, weight_of, model.index, own)
    if not rules:
        return problems
    _, others = read_contents(file.rename(rules), model)
    return [describe(rules, names), *others]


def rules_of_format(names: Iterable[str]) -> dict[str, str]:
    """Return what makes names PEFT's by themselves, whatever the base: see `rename`.

    >>> rules_of_format(["module.base_model.model.up.lora_A.default.weight"])
    {'module.base_model.model': 'base_model.model', 'default': ''}
    """
    factors = [name for name in names if ".lora_" in name]
    rules = dict(_candidates_of_format(factors)) if factors else {}
    return {x: y for x, y in rules.items() if all(rename(n, {x: y}) != n for n in factors)}


def _weight(
    name: str, names: Sequence[str], model: TorchBase, experts: Mapping[str, str]
) -> str | None:
    """Return the tensor of the base that a name is about, whether or not the base has it."""
    part = tensor_names.part_of_name(name, names, model.index)
    if part is None or part.field in ("", tensor_names.ORIGINAL):
        return part and part.module
    module = part.module.removesuffix(".base_layer")
    return experts.get(module, f"{module}.weight")


def _candidates(
    lost: Sequence[str], weights: Sequence[str | None], model: TorchBase
) -> Iterator[Rule]:
    """Yield rules that may help these names of tensors, whose weights the base does not have."""
    yield from _candidates_of_format(lost)
    yield from prefix_rules([x for x in weights if x], model.index, _START)


def _candidates_of_format(lost: Sequence[str]) -> Iterator[Rule]:
    inside = Counter(name.partition(tensor_names.PREFIX)[0] for name in lost if _START in name)
    for before, _ in inside.most_common(1):
        if before:
            yield f"{before}{_START}", _START
    adapters = Counter(found[1] for name in lost if (found := _ADAPTER.search(name)))
    for adapter, _ in adapters.most_common(1):
        yield adapter, ""
    if not inside:
        yield "", _START
