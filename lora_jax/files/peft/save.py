"""`save`: adapters as the two files of PEFT."""

import dataclasses
import os
from typing import Any

from lora_jax.core.config import LoraConfig
from lora_jax.files.disk import safetensors_file
from lora_jax.files.disk.atomic import write_directory
from lora_jax.files.naming import Naming
from lora_jax.files.peft import target_parameters, tensor_names, tied_head
from lora_jax.files.peft.adapter_file import TENSORS
from lora_jax.files.peft.config import CONFIG, PeftConfig
from lora_jax.files.peft.config_from_contents import in_modules, settings, wrong_targets
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.from_tree import check, collect, own_base


def save(
    directory: str | os.PathLike,
    adapters: Any,
    naming: Naming,
    *,
    base: Any = None,
    complete: bool = True,
    config: LoraConfig | PeftConfig | None = None,
    fold: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write adapters as Hugging Face PEFT does, so that it loads them on torch's model.

    The function that they make is the same there. Layers of a stack become modules of their own,
    those with the scale 0 are left out; experts become one parameter (`target_parameters`, where
    PEFT has no dropout); a leaf that joins q, k and v becomes three modules, and leaves that share
    a module get one, its rank the sum of theirs unless they share A. Ranks and scales that differ
    from the most common go to `rank_pattern` and `alpha_pattern`, under keys that match one module
    each. A leaf trained whole is its module saved whole, or, a bias, `bias`.

    The files replace an older pair as a whole, see `write_directory`.

    Args:
      directory: made where it is missing.
      adapters: an overlay, or a joined tree, which brings its base along.
      naming: which torch tensor is which leaf.
      base: the base of an overlay, arrays or `ShapeDtypeStruct`s. With it `target_modules` is short
        where the ends of names are enough. Its values are needed where a module is saved whole of
        which only a part was trained; its shapes, for rows of an embedding.
      complete: whether `base` has every module of torch's model. Without a base, or with a part of
        one, modules are named in full, so that PEFT adapts no others that are called alike.
      config: what the adapters were made with, for the dropout, rsLoRA, and the words in which
        ranks and targets are told.
      fold: multiply the scales into B, set alpha to the rank, pad all factors to the largest rank:
        right for readers that know no patterns, as vLLM and llama.cpp.
      base_model: the name or path of the base, which PEFT's `AutoPeftModel` looks for.
      task_type: PEFT's, as "CAUSAL_LM" or "SEQ_CLS".

    Raises:
      StructureError: what cannot be in such a file, all at once: paths that the naming does not
        have, DoRA on some modules alone, no factors at all, values that are not there; with `fold`
        also whatever but factors, which those readers reject.
      OSError: the files cannot be written; the old ones stand.

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
    base = own_base(adapters) if base is None else base
    contents, model = collect(adapters, naming, base)
    saved, problems = _modules_to_save(contents, model)
    problems += _refused(contents, fold) + target_parameters.find_unwritable(contents, model)
    check(problems + _tied_problems(contents, model, base is None))
    if fold:
        contents = _folded(contents)
    complete = complete and base is not None
    written = settings(contents, saved, model, None if fold else config, complete=complete)
    written = dataclasses.replace(
        written,
        base_model_name_or_path=base_model or written.base_model_name_or_path,
        task_type=task_type or written.task_type,
    )
    adapted = {module_of(name) for name in contents.factors}
    wrong = wrong_targets(written, adapted, [module_of(name) for name in model.adaptable()])
    wrong += [
        name
        for name in model.experts()
        if written.targets_parameter(name) != (name in contents.experts)
    ]
    check([f"{module}: PEFT's configuration cannot tell it from others" for module in wrong])
    files = {CONFIG: written.to_json().encode(), TENSORS: _encode(contents, model)}
    write_directory(directory, files)


def _modules_to_save(contents: Contents, model: TorchBase) -> tuple[list[str], list[str]]:
    """The modules that are saved whole; adds to the contents what of them was not trained.

    PEFT saves every module whose name ends in a name that is given, and needs all its tensors.
    """
    every = {module_of(name) for name in model.index}
    for module in tuple(every):
        parts = module.split(".")
        every |= {".".join(parts[:i]) for i in range(1, len(parts))}
    chosen = {module_of(name) for name in contents.whole if name.rpartition(".")[2] != "bias"}
    problems = [f"{name}: is in no module" for name in contents.whole if "." not in name]
    saved = sorted(module for module in every if any(module.endswith(m) for m in chosen if m))
    for name in model.index:
        if not in_modules(name, saved) or name in contents.whole:
            continue
        value = model.value(name)
        if any(name in those for those in (contents.factors, contents.experts, contents.rows)):
            problems.append(f"{name}: has an adapter, and is in a module that is saved whole")
        elif value is None:
            problems.append(f"{name}: is in a module that is saved whole; its value needs base=")
        else:
            contents.whole[name] = value
    return saved, problems


def _refused(contents: Contents, fold: bool) -> list[str]:
    """What PEFT, or with `fold` the readers that it is for, cannot have."""
    with_magnitude = [name for name, f in contents.factors.items() if f.magnitude is not None]
    there = contents.factors or contents.experts
    problems = [] if there else ["no module has factors, and PEFT needs one"]
    if with_magnitude and len(with_magnitude) < len(contents.factors):
        without = sorted(contents.factors.keys() - set(with_magnitude))
        problems.append(f"DoRA on some modules alone; without it: {', '.join(without)}")
    if fold:
        problems += [f"{name}: DoRA cannot be folded into the factors" for name in with_magnitude]
        others = [*contents.whole, *contents.rows]
        problems += [f"{name}: is trained itself, and fold=True is for factors" for name in others]
    return problems


def _tied_problems(contents: Contents, model: TorchBase, unknown: bool) -> list[str]:
    pair = tied_head.head_of(contents, model)
    if pair is None:
        return []
    factors = contents.factors.get(pair.embedding)
    if factors is not None and factors.magnitude is not None:
        return [f"{pair.embedding}: is the head too, where DoRA has other magnitudes"]
    return [f"{pair.embedding}: whether it is the head too needs base="] if unknown else []


def _folded(contents: Contents) -> Contents:
    ranks = [x.rank for x in contents.factors.values()]
    rank = max(ranks + [x.rank for x in contents.experts.values()])
    return dataclasses.replace(
        contents,
        factors={name: x.fold().pad(rank) for name, x in contents.factors.items()},
        experts={name: x.fold(rank) for name, x in contents.experts.items()},
    )


def _encode(contents: Contents, model: TorchBase) -> bytes:
    tensors = target_parameters.to_tensors(contents, model)
    adapted = {module_of(name) for name in contents.factors}
    for name, factors in contents.factors.items():
        tensors |= tensor_names.to_tensors(module_of(name), model.kind(name), factors)
    for name, value in contents.whole.items():
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.base_layer.{leaf}" if module in adapted else name
        tensors[tensor_names.PREFIX + inner] = value
    pair = tied_head.head_of(contents, model)
    if pair is not None and pair.embedding in contents.factors:
        copy = tied_head.transpose_for_head(contents.factors[pair.embedding])
        tensors |= tensor_names.to_tensors(module_of(pair.head), "linear", copy)
    elif pair is not None:
        tensors[tensor_names.PREFIX + pair.head] = contents.whole[pair.embedding]
    for name, (_, values) in contents.rows.items():
        tensors[f"{tensor_names.PREFIX}{module_of(name)}.{tensor_names.ROWS}"] = values
    return safetensors_file.encode(tensors, {"format": "pt"})
