"""Write adapters as the two files of PEFT: contents, problems, configuration, tensors."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from lora_jax.core.config import LoraConfig
from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import processes, safetensors_file
from lora_jax.files.disk.atomic import write_atomically, write_directory
from lora_jax.files.naming import Naming
from lora_jax.files.peft import target_parameters, tensor_names, tied_head
from lora_jax.files.peft.adapter_file import TENSORS
from lora_jax.files.peft.config import CONFIG, PeftConfig
from lora_jax.files.peft.config_from_contents import (
    Target,
    build_config,
    in_modules,
    wrong_targets,
)
from lora_jax.files.peft.model_card import CARD, ModelCard, may_replace_card
from lora_jax.files.stack_index import INDEX, named_adapters
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.from_tree import check, collect, find_unloadable

Config = LoraConfig | PeftConfig | None
_PLAIN = ModelCard()  # what the files themselves say


class Made(NamedTuple):
    """What the files of an adapter say."""

    config: PeftConfig
    tensors: dict[str, np.ndarray]


def save(
    directory: str | os.PathLike,
    adapters: Any,
    naming: Naming,
    *,
    base: Any = None,
    complete: bool = True,
    config: Config | Sequence[Config] = None,
    fold: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    names: Sequence[str] | None = None,
    card: ModelCard | None = _PLAIN,
) -> None:
    """Write adapters as Hugging Face PEFT does, so that PEFT loads them on the PyTorch model.

    The adapted function is the same there. Each layer of a stack becomes its own module, and
    layers whose scale is 0 are left out. Experts become one parameter (`target_parameters`, for
    which PEFT has no dropout). A leaf that joins q, k and v becomes three modules. Leaves that
    share a module become one, whose rank is the sum of theirs unless they share A. Ranks and scales
    that differ from the most common ones go to `rank_pattern` and `alpha_pattern`, under keys that
    match one module each. A fully trained leaf becomes a module in `modules_to_save`, or, if it is
    a bias, is covered by `bias`.

    The files replace an older pair as a whole, see `write_directory` in `files/disk/atomic.py`.
    Each adapter of a stack becomes a directory within `directory`, as PEFT itself writes
    several adapters, with its own rank and without padding; `stack.json` has their order.
    Where arrays span processes, all processes call this together, and process 0 writes.

    Args:
      directory: created if missing.
      adapters: an overlay, or a joined tree, which brings its own base; or a stack of either.
      naming: which PyTorch tensor is which leaf.
      base: the base of an overlay, arrays or `ShapeDtypeStruct`s. With it, `target_modules` is
        short wherever the ends of names are unambiguous. Its values are needed if only a part of a
        saved module was trained; its shapes are needed for trained rows of an embedding.
      complete: whether `base` has every module of the PyTorch model. Without a base, or with a
        part of one, modules are named in full, so that PEFT adapts no others of the same name.
      config: the configuration the adapters were made with: rsLoRA, and how to express ranks and
        targets; of a stack one for all, or one for each.
      fold: multiply the scales into B, set alpha to the rank, and pad all factors to the largest
        rank, for readers that ignore patterns, such as vLLM and llama.cpp. What B's dtype cannot
        hold goes to A, or to float32.
      base_model: the name or path of the base model, which PEFT's `AutoPeftModel` loads.
      task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS".
      names: the names of a stack's adapters, by default their numbers.
      card: what the model card says beside what the files do (license, data, figures). The card,
        `README.md`, is written with the files, and replaced with them until somebody changes it;
        one that lora_jax did not write is kept. None for no card.

    Raises:
      ConfigError: `names` or `config` does not fit the stack, or the adapters are not a stack.
      StructureError: the file cannot hold these adapters; all problems are listed at once: paths
        that are not in the naming, DoRA on only some modules, no LoRA factors at all, values that
        are abstract, NaN or infinite; with `fold` also everything except factors, which those
        readers reject.
      OSError: the files cannot be written; the old ones are kept.
      OtherProcessError: in the other processes, where process 0 raises `OSError`.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> config = lora_jax.LoraConfig(rank=2, alpha=4)
    >>> params = lora_jax.init(jax.random.key(0), {"up": {"kernel": jnp.ones((4, 3))}}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, naming, config=config, base_model="me/model")
    ...     tensors, _ = safetensors_file.read(f"{folder}/{TENSORS}")
    >>> {name.removeprefix("base_model.model."): x.shape for name, x in sorted(tensors.items())}
    {'up.lora_A.weight': (2, 4), 'up.lora_B.weight': (3, 2)}
    """
    files_of = functools.partial(
        _files,
        naming=naming,
        base=base,
        complete=complete,
        fold=fold,
        base_model=base_model,
        task_type=task_type,
    )
    several = processes.span_processes(adapters, base)
    if all(node.slots is None for node in adapted_nodes(adapters).values()):
        if names is not None:
            raise ConfigError("save: names are for a stack of adapters, and this is a single one")
        made_alone = files_of(adapters, config=cast("Config", config))
        processes.by_first(lambda: _write(Path(directory), made_alone, card), several=several)
        return
    index, trees = named_adapters("save", adapters, names)
    configs = list(config) if isinstance(config, Sequence) else [config] * len(trees)
    if len(configs) != len(trees):
        raise ConfigError(f"save: {len(configs)} configurations for {len(trees)} adapters")
    made = {
        name: _of_adapter(name, files_of, tree, one)
        for (name, tree), one in zip(trees.items(), configs, strict=True)
    }

    def write() -> None:
        for name, files in made.items():
            _write(Path(directory) / name, files, card)
        write_atomically(Path(directory) / INDEX, index.to_json().encode())

    processes.by_first(write, several=several)


def _write(directory: Path, made: Made, card: ModelCard | None) -> None:
    """Write an adapter's files, and a card unless somebody else's stands there."""
    files = {
        CONFIG: made.config.to_json().encode(),
        TENSORS: safetensors_file.encode(made.tensors, {"format": "pt"}),
    }
    if card is not None and may_replace_card(directory):
        parameters = sum(x.size for x in made.tensors.values())
        files[CARD] = card.text(made.config, parameters).encode()
    write_directory(directory, files)


def _of_adapter(name: str, files_of: Callable[..., Any], tree: Any, config: Config) -> Any:
    """Return the files of one adapter of a stack, or raise with its name."""
    try:
        return files_of(tree, config=config)
    except StructureError as error:
        raise StructureError(f"adapter {name} of the stack: {error}") from None


def _files(
    adapters: Any,
    *,
    naming: Naming,
    base: Any,
    complete: bool,
    config: Config,
    fold: bool,
    base_model: str | None,
    task_type: str | None,
) -> Made:
    """Return the content of an adapter's files; the arguments are those of `save`."""
    contents, model = collect(adapters, naming, base)
    task = task_type or getattr(config, "task_type", None)
    contents, saved, problems = _add_saved_modules(contents, model, task)
    target = Target.of(contents, model, complete=complete)
    check([*problems, *_problems(contents, target), *(_fold_problems(contents) if fold else [])])
    if fold:
        contents, config = _fold(contents), None
    check(find_unloadable(contents))
    written = build_config(contents, saved, target, config)
    check(_ambiguous_names(written, contents, model))
    written = dataclasses.replace(
        written,
        base_model_name_or_path=base_model or written.base_model_name_or_path,
        task_type=task_type or written.task_type,
    )
    return Made(written, _tensors(contents, target))


#: Modules that PEFT saves whole for a task, whether its configuration names them or not.
_OF_TASK = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def _add_saved_modules(
    contents: Contents, model: TorchBase, task: str | None
) -> tuple[Contents, list[str], list[str]]:
    """Choose the modules to save whole, and complete their tensors with those not trained.

    PEFT saves every module whose name ends in a given name, and needs all of its tensors. A head of
    several layers, such as RoBERTa's, is one module.

    Returns:
      The completed contents, the names of the modules, and the problems.
    """
    every = {module_of(name) for name in model.index}
    for module in tuple(every):
        parts = module.split(".")
        every |= {".".join(parts[:i]) for i in range(1, len(parts))}
    chosen = {module_of(name) for name in contents.whole if name.rpartition(".")[2] != "bias"}
    chosen = {
        next((x for x in _OF_TASK.get(task or "", ()) if m.startswith(f"{x}.")), m) for m in chosen
    }
    problems = [f"{name}: is not in a module" for name in contents.whole if "." not in name]
    saved = sorted(module for module in every if any(module.endswith(m) for m in chosen if m))
    whole = dict(contents.whole)
    for name in model.index:
        if not in_modules(name, saved) or name in whole:
            continue
        value = model.value(name)
        if any(name in those for those in (contents.factors, contents.experts, contents.rows)):
            problems.append(f"{name}: has an adapter, but is in a module that is fully trained")
        elif value is None:
            problems.append(
                f"{name}: is in a module that is fully trained, so the file needs its value: pass "
                "base= with arrays"
            )
        else:
            whole[name] = value
    return dataclasses.replace(contents, whole=whole), saved, problems


def _problems(contents: Contents, target: Target) -> list[str]:
    """Return what PEFT does not support."""
    problems = target_parameters.find_unwritable(contents, target.model)
    if not contents.factors and not contents.experts:
        problems.append("no module has LoRA factors, and PEFT needs one")
    without = [name for name, one in contents.factors.items() if one.magnitude is None]
    if 0 < len(without) < len(contents.factors):
        problems.append(f"only some modules have DoRA; without it: {', '.join(sorted(without))}")
    if target.tied is None:
        return problems
    embedding = target.tied.embedding
    factors = contents.factors.get(embedding)
    if factors is not None and factors.magnitude is not None:
        problems.append(f"{embedding}: the head is tied to it, where DoRA has other magnitudes")
    elif target.model.adapted_only:
        problems.append(f"{embedding}: pass base=, which shows whether the head is tied to it")
    return problems


def _fold_problems(contents: Contents) -> list[str]:
    """Return what the readers that need `fold` do not support."""
    dora = [name for name, one in contents.factors.items() if one.magnitude is not None]
    problems = [f"{name}: DoRA cannot be folded into the factors" for name in dora]
    trained = [*contents.whole, *contents.rows]
    return problems + [f"{n}: is fully trained, but fold=True is for factors" for n in trained]


def _ambiguous_names(written: PeftConfig, contents: Contents, model: TorchBase) -> list[str]:
    """Return the modules and parameters that PEFT would adapt, and should not, or the converse."""
    adapted = {module_of(name) for name in contents.factors}
    wrong = wrong_targets(written, adapted, [module_of(name) for name in model.adaptable()])
    wrong += [
        name
        for name in model.experts()
        if written.targets_parameter(name) != (name in contents.experts)
    ]
    return [f"{name}: PEFT's configuration cannot tell it from other modules" for name in wrong]


def _fold(contents: Contents) -> Contents:
    """Return the same updates with scale 1 and one rank."""
    ranks = [x.rank for x in contents.factors.values()]
    rank = max(ranks + [x.rank for x in contents.experts.values()])
    return dataclasses.replace(
        contents,
        factors={name: x.fold().pad(rank) for name, x in contents.factors.items()},
        experts={name: x.fold(rank) for name, x in contents.experts.items()},
    )


def _tensors(contents: Contents, target: Target) -> dict[str, np.ndarray]:
    """Return the file's tensors, under PEFT's names and in its shapes."""
    tensors = target_parameters.to_tensors(contents, target.model)
    adapted = {module_of(name) for name in contents.factors}
    for name, factors in contents.factors.items():
        tensors |= tensor_names.to_tensors(module_of(name), target.model.kind(name), factors)
    for name, value in contents.whole.items():
        tensors[tensor_names.of_whole(name, module_of(name) in adapted)] = value
    if target.tied is not None:
        tensors |= tied_head.to_tensors(contents, target.tied)
    for name, (_, values) in contents.rows.items():
        tensors[f"{tensor_names.PREFIX}{module_of(name)}.{tensor_names.ROWS}"] = values
    return tensors
