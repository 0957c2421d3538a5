"""Write adapters as the two files of mlx-lm."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import StructureError
from lora_jax.files.disk import processes, safetensors_file
from lora_jax.files.disk.atomic import write_directory
from lora_jax.files.mlx import adapter_file
from lora_jax.files.mlx.adapter_file import CONFIG, TENSORS
from lora_jax.files.mlx.limits import (
    ADAPTABLE,
    NOT_ADAPTABLE,
    find_turned,
    with_rows_as_outputs,
)
from lora_jax.files.naming import Naming
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.factors import TorchFactors
from lora_jax.files.torch_adapters.from_tree import check, collect, find_unloadable


def save(
    directory: str | os.PathLike,
    adapters: Any,
    naming: Naming,
    *,
    base: Any = None,
    base_model: str | None = None,
) -> None:
    """Write adapters as mlx-lm does, so that its `--adapter-path` accepts them.

    mlx-lm knows one rank and one scale: factors are padded with zeros to the largest rank, and
    scales that differ from the most common one are multiplied into B. Where arrays span processes,
    all processes call this together, and process 0 writes.

    Args:
      directory: created if missing; an older pair of files is replaced as a whole.
      adapters, naming, base: as for `lora_jax.peft.save`.
      base_model: the name or path of the base model, to keep in the file.

    Raises:
      StructureError: the file cannot hold these adapters; all problems are listed at once: fully
        trained leaves or rows, convolutions, DoRA on an embedding whose layout is not "oi", paths
        that are not in the naming, values that are NaN or infinite.
      OSError: the files cannot be written; the old ones are kept.
      OtherProcessError: in the other processes, where process 0 raises `OSError`.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> config = lora_jax.LoraConfig(rank=2, alpha=4)
    >>> params = lora_jax.init(jax.random.key(0), {"up": {"kernel": jnp.ones((4, 3))}}, config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, naming)
    ...     with open(f"{folder}/{CONFIG}") as file:
    ...         json.load(file)["lora_parameters"]["scale"]
    2.0
    """
    turned = find_turned(adapters, naming)
    lookups = [place.entry for place in turned]
    contents, model = collect(adapters, with_rows_as_outputs(naming, lookups), base)
    problems = _problems(contents, model)
    if problems or not contents.factors:
        lines = "\n".join(sorted(problems)) or "no module has LoRA factors"
        raise StructureError(f"save: an mlx-lm file cannot hold these adapters:\n{lines}")
    scale, factors = _make_uniform(contents.factors)
    check(find_unloadable(Contents(factors=factors)))
    config = adapter_file.config(
        scale=scale,
        rank=next(iter(factors.values())).rank,
        use_dora=any(one.magnitude is not None for one in factors.values()),
        dropout=contents.dropout,
        keys=sorted({_name_in_layer(module_of(name)) for name in factors}),
        base_model=base_model,
    )
    by_rows = {name for place in turned for _, names in place.layers() for name in names}
    files = {
        CONFIG: json.dumps(config, indent=4, sort_keys=True).encode(),
        TENSORS: safetensors_file.encode(_tensors(factors, by_rows), {"format": "mlx"}),
    }
    processes.by_first(
        lambda: write_directory(directory, files),
        several=processes.span_processes(adapters, base),
    )


def _problems(contents: Contents, model: TorchBase) -> list[str]:
    """Return what keeps these contents out of an mlx-lm file."""
    others = [*contents.whole, *contents.rows]
    problems = [f"{name}: is fully trained; an mlx-lm file holds LoRA factors" for name in others]
    problems += [
        f"{n}: adapters of experts' parameters are not supported" for n in contents.experts
    ]
    for name, one in contents.factors.items():
        problem = _unsupported(model.kind(name), one.magnitude is not None)
        problems += [f"{name}: {problem}"] if problem else []
    without = [name for name, one in contents.factors.items() if one.magnitude is None]
    if 0 < len(without) < len(contents.factors):
        problems.append(f"only some modules have DoRA; without it: {', '.join(sorted(without))}")
    return problems


def _unsupported(kind: str, has_magnitude: bool) -> str | None:
    """Return what keeps a module of this kind out of the file, or None."""
    if kind not in ADAPTABLE:
        return NOT_ADAPTABLE
    if has_magnitude and kind == "embedding":
        return (
            "is an embedding with one magnitude per column, but mlx-lm needs one per row: give it "
            'the layout "oi" with LoraConfig(overrides=...)'
        )
    return None


def _make_uniform(
    factors: Mapping[str, TorchFactors],
) -> tuple[float, dict[str, TorchFactors]]:
    """Return the most common scale, and the factors, all with this scale and the same rank."""
    ((scale, _),) = Counter(one.scale for one in factors.values()).most_common(1)
    rank = max(one.rank for one in factors.values())
    equal = {}
    for name, one in factors.items():
        if one.scale != scale:
            one = dataclasses.replace(one, scale=one.scale / scale).fold()
        equal[name] = dataclasses.replace(one.pad(rank), scale=scale)
    # the shortest decimal with the same float32 value
    return float(np.format_float_positional(np.float32(scale), unique=True)), equal


def _tensors(
    factors: Mapping[str, TorchFactors], by_rows: Collection[str]
) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, one in factors.items():
        tensors |= adapter_file.to_tensors(module_of(name), one, rows_are_outputs=name in by_rows)
    return tensors


def _name_in_layer(module: str) -> str:
    """Return a module's name within its layer, as mlx-lm's `keys` has it."""
    segments = module.split(".")
    numbers = [i for i, segment in enumerate(segments) if segment.isdigit()]
    return ".".join(segments[numbers[0] + 1 :]) if numbers else module
