"""`PeftConfig`: an `adapter_config.json` with every key checked; only data and its rules."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_jax.core.checks import is_integer, is_number
from lora_jax.core.errors import AdapterFileError, ConfigError
from lora_jax.files.disk import strict_json
from lora_jax.files.peft import bounded_regex

CONFIG = "adapter_config.json"
_BIASES = ("none", "all", "lora_only")
#: The expressions in which PEFT puts an entry of these fields, which a list or a mapping holds.
_WITHIN = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)(?:{})\.(?P<number_of_the_layer>\d+)\.",
}
_WITHIN["last"] = r".*\.(?:{})\.(?P<number_of_the_layer>\d+)\."  # up to PEFT 0.18
#: Initializations that change the base, and their names: A and B are meaningless without it.
CHANGES_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# Keys that change the meaning of A and B, and how; supported only if they are off.
REFUSED = {
    "alora_invocation_tokens": "the adapter is active only after these tokens",
    "arrow_config": "adapters are mixed by a router",
    "kasa_config": "the base is truncated to its largest singular values",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "the tensors are shards",
    "monteclora_config": "the factors are samples",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "A is applied to averages of its inputs",
}


def _is_number(x: Any) -> bool:
    # false for nan, inf, and integers that exceed any float
    return is_number(x) and abs(x) <= 1e30


def _is_rank(x: Any) -> bool:
    return is_integer(x) and 0 < x < 2**31


def _is_names(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def _is_numbers(x: Any) -> bool:
    return isinstance(x, tuple) and all(is_integer(i) and 0 <= i < 2**31 for i in x)


def _is_mapping(x: Any, is_value: Callable[[Any], bool]) -> bool:
    return isinstance(x, Mapping) and all(isinstance(k, str) and is_value(x[k]) for k in x)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or check(x)


_FLAG = (lambda x: isinstance(x, bool), "true or false")
_TEXT = (_or_none(lambda x: isinstance(x, str)), "a string or null")
_TARGETS = (
    _or_none(lambda x: isinstance(x, str) or _is_names(x)),
    "a regular expression, a list of module names or null",
)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "rank_pattern": (lambda x: _is_mapping(x, _is_rank), "a mapping from names to ranks"),
    "alpha_pattern": (lambda x: _is_mapping(x, _is_number), "a mapping from names to numbers"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "inference_mode": _FLAG,
    "ensure_weight_tying": _FLAG,
    "bias": (lambda x: x in _BIASES, f"one of {', '.join(_BIASES)}"),
    "lora_dropout": (lambda x: _is_number(x) and 0 <= x <= 1, "a probability"),
    "init_lora_weights": (lambda x: isinstance(x, bool | str), "true, false or a name"),
    "modules_to_save": (_or_none(_is_names), "a list of module names or null"),
    "layers_to_transform": (
        _or_none(lambda x: is_integer(x) or _is_numbers(x)),
        "a list of layer numbers, a number or null",
    ),
    "layers_pattern": (
        _or_none(lambda x: isinstance(x, str) or _is_names(x)),
        "a name, a list of names or null",
    ),
    "trainable_token_indices": (
        _or_none(lambda x: _is_numbers(x) or _is_mapping(x, _is_numbers)),
        "a list of token numbers, a mapping from module names to such lists, or null",
    ),
    "target_parameters": (_or_none(_is_names), "a list of parameter names or null"),
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "peft_version": _TEXT,
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The content of an `adapter_config.json` of Hugging Face PEFT, checked key by key.

    The fields have PEFT's names and defaults; lists become tuples. Other keys are kept in `others`
    and written back, unless they change the meaning of the tensors: those are rejected by name. See
    https://huggingface.co/docs/peft/package_reference/lora.

    Raises:
      ConfigError: keys have invalid values; all are listed, each with its value.

    >>> config = PeftConfig(r=8, lora_alpha=16, target_modules=["q_proj"], alpha_pattern={"0.q": 4})
    >>> config.scale("layers.1.q_proj"), config.scale("layers.0.q")
    (2.0, 0.5)
    >>> config.targets("model.layers.1.q_proj"), config.targets("model.layers.1.k_proj")
    (True, False)
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Any = None
    exclude_modules: Any = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    trainable_token_indices: Any = None
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    inference_mode: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _CHECKS:
            object.__setattr__(self, name, _freeze(getattr(self, name)))
        problems = [
            f"{name} must be {what}, got {_show(getattr(self, name))}"
            for name, (check, what) in _CHECKS.items()
            if not check(getattr(self, name))
        ]
        if not problems:  # these checks rely on valid values
            problems = [*_find_bad_patterns(self), *_find_refused(self)]
        if problems:
            raise ConfigError("; ".join(problems))

    def rank(self, module: str) -> int:
        """Return a module's rank, from the first matching key of `rank_pattern`, else `r`."""
        key = first_match(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scale(self, module: str, rank: int | None = None) -> float:
        """Return a module's α/r, or α/√r with `use_rslora`; `rank` overrides the configured one."""
        key = first_match(self.alpha_pattern, module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank(module) if rank is None else rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, *, last_number: bool = False) -> bool:
        """Return whether PEFT adapts the module of this name, if its type can be adapted.

        Args:
          module: the name.
          last_number: whether the layer is the last number in the name ("experts.3"), as up to PEFT
            0.18, and not the first.
        """
        if _in(self.exclude_modules, module) or self._saves(module):
            return False
        if not _in(self.target_modules, module):
            return False
        if self.layers_to_transform in (None, ()) or isinstance(self.target_modules, str):
            return True
        if module in self.target_modules:  # a whole name is in no need of a layer
            return True
        number, chosen = self._layer(module, last_number), self.layers_to_transform
        return number is not None and number in (chosen if isinstance(chosen, tuple) else (chosen,))

    @property
    def changes_base(self) -> str | None:
        """The name of an initialization that changed the base, for which A and B are."""
        start = str(self.init_lora_weights).lower()
        return next((CHANGES_BASE[x] for x in CHANGES_BASE if start.startswith(x)), None)

    def targets_parameter(self, name: str) -> bool:
        """Return whether PEFT adapts the parameter of this name by `target_parameters`."""
        return _in(self.target_parameters, name)

    def rows(self, module: str) -> tuple[int, ...] | None:
        """Return the trained rows of an embedding, or None if the configuration has none."""
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            return next((rows for key, rows in indices.items() if module.endswith(key)), None)
        return indices

    def _saves(self, module: str) -> bool:
        names = self.modules_to_save or ()
        return any(bounded_regex.match(_within("modules_to_save", x), module) for x in names)

    def _layer(self, module: str, last: bool) -> int | None:
        """Return the number of a module's layer, parsed from the name as PEFT does."""
        if not self.layers_pattern:
            found = re.match(rf"{'.*' if last else '.*?'}\.[^.]*\.(\d+)\.", module)
            return int(found[1]) if found else None
        names = self.layers_pattern
        for name in (names,) if isinstance(names, str) else names:
            found = bounded_regex.match(_within("last" if last else "layers_pattern", name), module)
            if found:
                return int(found["number_of_the_layer"])
        return None

    def to_json(self) -> str:
        """Return the text of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        others = fields.pop("others")
        return json.dumps({**others, "peft_type": "LORA", **fields}, indent=2, sort_keys=True)


def is_config(values: Mapping[str, Any]) -> bool:
    """Return whether the values of an `adapter_config.json` are PEFT's."""
    return "peft_type" in values


def parse_config(text: str | bytes) -> PeftConfig:
    """Parse the text of an `adapter_config.json`.

    Raises:
      ConfigError: it is not a JSON mapping, not of type LORA, or `PeftConfig` rejects it.
    """
    try:
        values = strict_json.parse_json(text, CONFIG)
    except AdapterFileError as error:
        raise ConfigError(str(error).removeprefix(f"{CONFIG}: ")) from None
    if not isinstance(values, dict):
        raise ConfigError(f"must be a mapping, got {_show(values)}")
    kind = values.pop("peft_type", None)
    if kind != "LORA":
        raise ConfigError(f"peft_type must be LORA, the only supported type, got {_show(kind)}")
    # PEFT writes null for keys that were never set
    unset = {"rank_pattern", "alpha_pattern", "init_lora_weights", "lora_bias"}
    values = {k: v for k, v in values.items() if not (v is None and k in unset)}
    known = {name: values.pop(name) for name in _CHECKS if name in values}
    values.pop("runtime_config", None)
    return PeftConfig(**known, others=values)


def _freeze(value: Any) -> Any:
    """Turn lists into tuples, and mappings into plain dicts, recursively."""
    if isinstance(value, list | set | frozenset):
        return tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if isinstance(value, Mapping):
        return {key: _freeze(inner) for key, inner in value.items()}
    return value


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _find_bad_patterns(config: PeftConfig) -> Iterable[str]:
    """Yield a problem per string that should be a regular expression, but is not."""
    layers = config.layers_pattern or ()
    given = {
        "target_modules": [config.target_modules],
        "exclude_modules": [config.exclude_modules],
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
        "modules_to_save": config.modules_to_save or (),
        "layers_pattern": (layers,) if isinstance(layers, str) else layers,
    }
    for name, entries in given.items():
        for entry in entries:
            within = _WITHIN.get(name, "{}")
            why = bounded_regex.problem(entry, within) if isinstance(entry, str) else None
            if why:
                yield f"{name}: {_show(entry)} is not a regular expression ({why})"


def _find_refused(config: PeftConfig) -> Iterable[str]:
    for name, why in REFUSED.items():
        if config.others.get(name):
            yield f"{name} is {_show(config.others[name])}: {why}, which is not supported"


def _in(targets: Any, module: str) -> bool:
    """Apply PEFT's rule: a string is a regex for the whole name, a list has names or their ends."""
    if isinstance(targets, str):
        return bounded_regex.fullmatch(targets, module)
    names = targets or ()
    return any(module == name or module.endswith("." + name) for name in names)


def first_match(keys: Iterable[str], module: str) -> str | None:
    """Return the first pattern that matches a module, by PEFT's rule."""
    within = lambda key: _within("rank_pattern", key)
    return next((key for key in keys if bounded_regex.match(within(key), module)), None)


def _within(field: str, pattern: str) -> str:
    return _WITHIN[field].replace("{}", pattern)


def exact_pattern(module: str, modules: Iterable[str]) -> str:
    """Return a key for `rank_pattern` that matches `module` and no other of `modules`.

    >>> exact_pattern("h.0.q", ["h.0.q", "h.1.q"]), exact_pattern("h.0.q", ["h.0.q", "x.h.0.q"])
    ('h.0.q', '^h\\\\.0\\\\.q')
    """
    others = [name for name in modules if name != module]
    for pattern in (module, re.escape(module)):
        if first_match([pattern], module) and all(
            first_match([pattern], x) is None for x in others
        ):
            return pattern
    return "^" + re.escape(module)
