"""Read a GGUF adapter onto a base."""

import os
from collections.abc import Sequence
from typing import Any, Unpack

from lora_jax.adapters.split import base_of
from lora_jax.core.errors import AdapterFileError
from lora_jax.core.foreign import shown
from lora_jax.files.gguf.adapter_file import GgufAdapter, read_file
from lora_jax.files.gguf.names import Names
from lora_jax.files.torch_adapters.contents import Contents, TorchBase
from lora_jax.files.torch_adapters.experts import Experts
from lora_jax.files.torch_adapters.file_contents import weight_shape
from lora_jax.files.torch_adapters.to_tree import FitOptions, fit_to_base


def load(
    path: str | os.PathLike,
    base: Any,
    names: Names,
    *,
    strict: bool = True,
    dtype: Any = None,
    dropout: float | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> Any:
    """Load a GGUF adapter, as llama.cpp's `--lora` takes it, as an overlay of `base`.

    The scale is alpha over the rank of each weight, and 1 where alpha is 0 or missing, as in
    llama.cpp. Factors keep their dtype; quantized ones become float32.

    Args:
      path: the file.
      base: the parameters, arrays or `ShapeDtypeStruct`s.
      names: what llama.cpp calls the model and its tensors: `models.gguf_names(model)`.
      strict: whether tensors without a place are an error, and not a warning. llama.cpp ignores
        the norms of an adapter.
      dtype, dropout, fsdp: as for `lora_jax.peft.load`.

    Raises:
      AdapterFileError: the file is damaged, contains something else, or an adapter of another
        architecture, or its tensors do not fit the base; all problems are listed at once.
      FileNotFoundError: it does not exist.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax.files.naming import Entry, Naming
    >>> base = {"query": {"kernel": jnp.ones((4, 3))}}
    >>> params = lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(rank=2, alpha=4))
    >>> row = Entry("blk.0.attn_q.weight", "query/kernel", "linear")
    >>> names = Names("qwen2", Naming((row,)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora_jax.gguf.save(f"{folder}/adapter.gguf", params, names)
    ...     adapters = load(f"{folder}/adapter.gguf", base, names)
    >>> adapters["query"]["kernel"].a.shape, float(adapters["query"]["kernel"].scale)
    ((4, 2), 2.0)
    """
    options: dict[str, Any] = {"strict": strict, "dtype": dtype, "dropout": dropout}
    return fit(read_file(path), base, names, **options, fsdp=fsdp)


def fit(
    file: GgufAdapter,
    base: Any,
    names: Names,
    **options: Unpack[FitOptions],
) -> Any:
    """Return the adapters of a file as an overlay of `base`; what `load` does after reading."""
    if file.architecture != names.architecture:
        raise AdapterFileError(
            f"{file.source}: an adapter of the architecture {shown(file.architecture)!r}, but the "
            f"model is {names.architecture!r}; give the model that it was made for"
        )
    model, contents = TorchBase(base_of(base), names.naming), Contents()
    problems = [f"{name}: is not a factor (lora_a, lora_b)" for name in file.others()]
    for weight, fields in file.weights().items():
        found = file.factors(weight, fields)
        if weight not in model.index:
            problems.append(f"{weight}: {model.unknown(weight)}")
        elif isinstance(found, str):
            problems.append(f"{weight}: {found}")
        elif problem := _misfit(weight, found, model):
            problems.append(f"{weight}: {problem}")
        elif isinstance(found, Experts):
            contents.experts[weight] = found
        else:
            contents.factors[weight] = found
    return fit_to_base(file.source, contents, problems, model, **options)


def _misfit(weight: str, found: Any, model: TorchBase) -> str | None:
    """Return why factors do not fit their weight, or None."""
    kind, shape = model.kind(weight), model.shape(weight)
    own: tuple[int, ...]
    if isinstance(found, Experts):
        own = (len(found.a), found.b.shape[1], found.a.shape[2])
        fits = model.has_experts(weight) and (len(shape), *model.sides(weight)) == (3, *own[1:])
        if fits and own[0] == model.count(weight):
            return None
    elif kind not in ("linear", "embedding"):
        return "has no adapter in GGUF: neither a linear layer nor the token embedding"
    else:
        own = weight_shape(kind, found)
        if own == shape:
            return None
    return f"the factors are for a weight {own}, but the model's is {shape}"
