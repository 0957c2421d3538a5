"""Build the configuration with which PEFT makes exactly the modules that a file holds."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.config import LoraConfig
from lora_jax.files.peft import target_parameters, tied_head
from lora_jax.files.peft.config import PeftConfig, exact_pattern
from lora_jax.files.peft.tied_head import Tied
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.factors import TorchFactors


@dataclasses.dataclass(frozen=True)
class Target:
    """The PyTorch model that a file is written for, as far as it is known."""

    model: TorchBase
    complete: bool  # whether `model` has all modules, so that ends of names can be told apart
    tied: Tied | None  # the adapted embedding that is also the head

    @classmethod
    def of(cls, contents: Contents, model: TorchBase, *, complete: bool) -> "Target":
        """Return the target of these contents; `complete` is false without a base."""
        tied = tied_head.find(model)
        is_adapted = tied is not None and tied.is_in(contents)
        return cls(model, complete and not model.adapted_only, tied if is_adapted else None)


def build_config(
    contents: Contents,
    saved: Sequence[str],
    target: Target,
    given: LoraConfig | PeftConfig | None,
) -> PeftConfig:
    """Return the configuration of these contents.

    The ranks, scales and targets of `given` are kept wherever they give exactly these modules.

    Args:
      contents: what the file holds.
      saved: the modules to save whole.
      target: the model that the file is for.
      given: the configuration the adapters were made with, if it is known.
    """
    model = target.model
    modules = {module_of(name): factors for name, factors in contents.factors.items()}
    ranked: dict[str, TorchFactors | Experts] = {**modules, **contents.experts}
    if target.tied is not None and target.tied.embedding in contents.factors:
        ranked[module_of(target.tied.head)] = contents.factors[target.tied.embedding]
    kinds = {model.kind(name) for name in contents.factors}
    start = _start(given)
    rows = {module_of(name): rows for name, (rows, _) in contents.rows.items()}
    config = dataclasses.replace(
        start,
        **_parameters(start, contents, target),
        lora_dropout=0.0 if contents.experts else contents.dropout,  # PEFT's rule
        use_dora=any(factors.magnitude is not None for factors in modules.values()),
        fan_in_fan_out="conv1d" in kinds,
        ensure_weight_tying=target.tied is not None,
        bias=_bias(contents, saved),
        modules_to_save=tuple(saved) or None,
        trainable_token_indices=rows or None,
    )
    if not all(_agrees(config, name, factors) for name, factors in ranked.items()):
        config = dataclasses.replace(config, **_ranks(ranked, start))
    adaptable = [module_of(name) for name in model.adaptable()]
    if wrong_targets(config, modules, adaptable):
        fresh = dataclasses.replace(config, exclude_modules=None, layers_to_transform=None)
        fresh = dataclasses.replace(fresh, layers_pattern=None)
        targets = _targets(modules, adaptable, target.complete)
        return dataclasses.replace(fresh, target_modules=targets)
    return config


def _parameters(start: PeftConfig, contents: Contents, target: Target) -> dict[str, Any]:
    """Return the fields of the configuration on experts' parameters."""
    if not contents.experts:
        return {"target_parameters": None}
    every, targets = target.model.experts(), start.target_parameters
    if any(start.targets_parameter(name) != (name in contents.experts) for name in every):
        targets = target_parameters.shortest_names(contents.experts, every, target.complete)
    modules = () if start.target_modules is None else start.target_modules
    # None would mean the model's default modules
    return {"target_parameters": targets, "target_modules": modules}


def _start(given: LoraConfig | PeftConfig | None) -> PeftConfig:
    if isinstance(given, PeftConfig):
        # what was read is for the base as it is now
        start = True if given.changes_base else given.init_lora_weights
        return dataclasses.replace(
            given, lora_bias=False, inference_mode=True, init_lora_weights=start
        )
    if given is None:
        return PeftConfig()
    return PeftConfig(
        r=given.rank,
        lora_alpha=float(given.rank if given.alpha is None else given.alpha),
        use_rslora=given.scaling == "rslora",
    )


def _agrees(config: PeftConfig, module: str, factors: TorchFactors | Experts) -> bool:
    # the scale's leaf is float32
    same_scale = np.float32(config.scale(module)) == np.float32(factors.scale)
    return config.rank(module) == factors.rank and bool(same_scale)


def _ranks(modules: Mapping[str, TorchFactors | Experts], start: PeftConfig) -> dict[str, Any]:
    """Return the most common rank and alpha, and patterns for the modules that have others."""
    ranks = {module: factors.rank for module, factors in modules.items()}
    alphas = {m: alpha_of(f.scale, f.rank, start.use_rslora) for m, f in modules.items()}
    rank, alpha = _most_common(ranks, start.r), _most_common(alphas, start.lora_alpha)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(m, modules): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(m, modules): x for m, x in alphas.items() if x != alpha},
    }


def _most_common(values: Mapping[str, Any], wanted: Any) -> Any:
    """Return the most common value; on a tie, `wanted`."""
    counts = Counter(values.values())
    return max(counts, key=lambda x: (counts[x], x == wanted)) if counts else wanted


def alpha_of(scale: float, rank: int, use_rslora: bool) -> float:
    """Return the roundest alpha that gives this scale, to float32 precision.

    >>> alpha_of(float(np.float32(4 / 3)), 3, False), alpha_of(0.5, 8, False)
    (4, 4)
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    for digits in range(16):
        alpha = round(scale * divisor, digits)
        if np.float32(alpha / divisor) == np.float32(scale):
            return int(alpha) if alpha == int(alpha) else alpha
    return scale * divisor


def wrong_targets(
    config: PeftConfig, modules: Collection[str], adaptable: Collection[str]
) -> list[str]:
    """Return the modules that the configuration targets and should not, or the converse.

    Not every PEFT that may read the file counts the layers alike.
    """
    return [
        m
        for m in adaptable
        if any(config.targets(m, last_number=last) != (m in modules) for last in (False, True))
    ]


#: The part of a model that reads text, where others, outside the naming, have modules of the same
#: ends: the layers of Gemma 3 and of its images are both `self_attn.q_proj`.
_PART = "language_model"


def _targets(modules: Collection[str], adaptable: Sequence[str], complete: bool) -> Any:
    """Return `target_modules` for exactly these: ends of names, whole names, or a regex."""
    ends = {_end(module): None for module in modules}
    choices = [tuple(ends), tuple(modules)]
    if not complete:  # a name of one segment is the end of others
        choices = choices[1:] if all("." in module for module in modules) else []
    if any(_PART in module.split(".") for module in modules):
        choices = choices[-1:]
    for names in choices:
        if not wrong_targets(PeftConfig(target_modules=names), modules, adaptable):
            return tuple(sorted(names))
    return "|".join(re.escape(name) for name in sorted(modules))


def _end(module: str) -> str:
    """Return what follows the last number: "self_attn.q_proj" of "layers.0.self_attn.q_proj".

    The last segment is not enough: a module outside the naming may have the same.
    """
    segments = module.split(".")
    numbers = [i for i, segment in enumerate(segments) if segment.isdigit()]
    return ".".join(segments[numbers[-1] + 1 :] if numbers else segments) or module


def _bias(contents: Contents, saved: Sequence[str]) -> str:
    """Return PEFT's word for which biases are trained."""
    biases = [name for name in contents.whole if not in_modules(name, saved)]
    if not biases:
        return "none"
    adapted = {module_of(name) for name in contents.factors}
    return "lora_only" if all(module_of(name) in adapted for name in biases) else "all"


def in_modules(name: str, modules: Sequence[str]) -> bool:
    """Return whether a tensor is in one of the modules, or in a module within one."""
    return any(name.startswith(module + ".") for module in modules)
