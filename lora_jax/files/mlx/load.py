"""Read an mlx-lm directory onto a base."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from lora_jax.adapters.split import base_of
from lora_jax.files.mlx.adapter_file import MAGNITUDE, A, B, MlxFile, read_file, to_factors
from lora_jax.files.mlx.limits import (
    ADAPTABLE,
    EXPERTS_UNSUPPORTED,
    NOT_ADAPTABLE,
    with_rows_as_outputs,
)
from lora_jax.files.naming import Naming
from lora_jax.files.torch_adapters.contents import (
    Contents,
    TorchBase,
    dtype_problem,
    module_of,
)
from lora_jax.files.torch_adapters.rename import describe, find_rules
from lora_jax.files.torch_adapters.to_tree import FitOptions, fit_to_base


def load(
    directory: str | os.PathLike,
    base: Any,
    naming: Naming,
    *,
    strict: bool = True,
    dtype: Any = None,
    dropout: float | None = None,
    rename: Mapping[str, str] | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> Any:
    """Load the adapters that mlx-lm trained as an overlay of `base`.

    mlx-lm names modules as Hugging Face does, so the same naming serves. `lora_a` is `[in, rank]`
    and `lora_b` is `[rank, out]`; the update is `scale · lora_a · lora_b`, with one scale for all
    modules (https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py). With
    `fine_tune_type` "dora" there is a magnitude `m` too: one number per output of a linear layer,
    and one per row of an embedding, which therefore gets the layout "oi", its rows as outputs.

    Args:
      directory: with `adapter_config.json` and `adapters.safetensors`.
      base, naming, strict, dtype, dropout, rename, fsdp: as for `lora_jax.peft.load`.

    Raises:
      AdapterFileError: a file is missing or damaged, or its tensors do not fit the base; all
        problems are listed at once.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry
    >>> base = {"up": {"kernel": jnp.ones((4, 3))}}
    >>> params = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(rank=2, alpha=4))
    >>> naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora_jax.mlx.save(folder, params, naming)
    ...     adapters = load(folder, base, naming)
    >>> adapters["up"]["kernel"].a.shape, float(adapters["up"]["kernel"].scale)
    ((4, 2), 2.0)
    """
    file = read_file(directory)
    options: dict[str, Any] = {"strict": strict, "dtype": dtype, "dropout": dropout}
    return fit(file, base, naming, **options, rename=rename, fsdp=fsdp)


def fit(
    file: MlxFile,
    base: Any,
    naming: Naming,
    *,
    rename: Mapping[str, str] | None = None,
    **options: Unpack[FitOptions],
) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    base = base_of(base)
    model, turned = TorchBase(base, naming), set[str]()
    if file.use_dora:
        turned = {name for name in model.adaptable() if model.kind(name) == "embedding"}
        lookups = [entry for entry in naming.entries if entry.kind == "embedding"]
        model = TorchBase(base, with_rows_as_outputs(naming, lookups))
    file = file.rename(rename) if rename else file
    contents, problems = _read_contents(file, model, turned)
    rules = find_rules(list(file.tensors), lambda x: f"{module_of(x)}.weight", model.index)
    if rules:
        _, others = _read_contents(file.rename(rules), model, turned)
        problems = [describe(rules, file.tensors), *others]
    return fit_to_base(file.source, contents, problems, model, **options)


def _read_contents(
    file: MlxFile, model: TorchBase, turned: Collection[str]
) -> tuple[Contents, list[str]]:
    """Return what fits the base, and what is wrong with the rest.

    Args:
      file: the file.
      model: the base.
      turned: the embeddings' weights whose rows are outputs.
    """
    found, modules = Contents(dropout=file.dropout), file.modules()
    expected = (A, B, MAGNITUDE) if file.use_dora else (A, B)
    fields = {m: {e: x for e, x in all_.items() if e in expected} for m, all_ in modules.items()}
    in_modules = {f"{module}.{ending}" for module, own in fields.items() for ending in own}
    problems = [f"{name}: unexpected" for name in file.tensors.keys() - in_modules]
    for module, own in fields.items():
        weight = f"{module}.weight"
        wrong = _problems(module, own, expected, weight in turned, model)
        problems += wrong
        if not wrong:
            rows = weight in turned
            found.factors[weight] = to_factors(own, file.scale, rows_are_outputs=rows)
    return found, problems


def _problems(
    module: str,
    fields: Mapping[str, np.ndarray],
    needed: Sequence[str],
    turned: bool,
    model: TorchBase,
) -> list[str]:
    """Return what keeps one module's tensors from standing on the base."""
    weight, names = f"{module}.weight", [f"{module}.{ending}" for ending in fields]
    if weight not in model.index:
        return [f"{name}: {model.unknown(weight)}" for name in names]
    if model.has_experts(weight):
        return [f"{name}: {EXPERTS_UNSUPPORTED}" for name in names]
    problems = [f"{module}.{ending}: missing" for ending in needed if ending not in fields]
    for name, tensor in zip(names, fields.values(), strict=True):
        problem = dtype_problem(tensor)
        problems += [f"{name}: {problem}"] if problem else []
    kind = "embedding" if turned else model.kind(weight)
    misfit = None if problems else _misfit(fields, kind, model.shape(weight))
    return [f"{module}: {misfit}"] if misfit else problems


def _misfit(fields: Mapping[str, np.ndarray], kind: str, shape: tuple[int, ...]) -> str | None:
    """Return why the shapes of a module's tensors do not fit its weight, or None."""
    if kind not in ADAPTABLE:
        return NOT_ADAPTABLE
    ins, out = shape[::-1] if kind == "linear" else shape
    rank = fields[A].shape[-1] if fields[A].ndim else 0
    wanted = {A: (ins, rank), B: (rank, out), MAGNITUDE: (out if kind == "conv1d" else shape[0],)}
    got = {ending: tensor.shape for ending, tensor in fields.items()}
    if rank and all(got[ending] == wanted[ending] for ending in got):
        return None
    shapes = ", ".join(f"{ending} {got[ending]}" for ending in sorted(got))
    return f"{shapes} do not fit the weight {shape}, which needs [in, rank] and [rank, out]"
