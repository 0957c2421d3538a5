"""Published models by path: load them, and the naming of their leaves."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError, ModelFileError, StructureError, TargetError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files import naming as names
from lora_jax.files.naming import Naming
from lora_jax.models import hf_directory
from lora_jax.models.decoder import gguf
from lora_jax.models.decoder.config import PARAM_DTYPES
from lora_jax.models.families import TIED_HEAD, family_of, is_tied
from lora_jax.models.weights import published, sharding_rules
from lora_jax.models.weights.family import Family, Kind, Options
from lora_jax.models.weights.kept import kept_shapes, warn_of_floats
from lora_jax.models.weights.quantization import (
    KEEP,
    Quantize,
    parse_quantize,
    quantized_shapes,
)


@dataclass(frozen=True)
class Apply:
    """A module as a function of its parameters: `apply(params, *args)`.

    Two of these are equal if their modules are, so a function that takes one as a static argument
    is not compiled again.
    """

    module: nn.Module

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `module.apply` with `params` as its parameters; the rest is passed on.

        Raises:
          StructureError: some of the parameters are quantized.
        """
        quantized = [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)]
        if quantized:
            raise StructureError(
                f"{len(quantized)} parameters of the model are quantized, first {quantized[0]!r}: "
                "call lora_jax.lora(model.apply)(params, ...) instead of model.apply, or make "
                "floats of them with lora_jax.dequantize(params)"
            )
        return self.module.apply({"params": params}, *args, **kwargs)


@dataclass(frozen=True)
class Pretrained:
    """A published model.

    Attributes:
      kind: what it computes: "encoder" (hidden states of a text), "decoder" (logits of the next
        token), "vision" (features or classes of an image) or "speech" (logits of the tokens of what
        is said).
      config: its sizes.
      module: the Flax module, to be applied to `{"params": params}`.
      params: the parameter tree.
      naming: Hugging Face's name for every leaf, whatever file they come from.
      settings: the content of its config.json.
      rest: other tensors in the file by name, such as BERT's pooler and a classifier's head; `save`
        writes them back.
      in_files: the names of the leaves in the files that `save` writes, where they differ from
        those of the modules in transformers; None where they are the same.
    """

    kind: Kind
    config: Any
    module: Any
    params: Any
    naming: Naming
    settings: Mapping[str, Any]
    rest: Mapping[str, Any] = field(default_factory=dict)
    in_files: Naming | None = None

    @property
    def apply(self) -> Apply:
        """The model as a function of `params`: `apply(params, ids, segments)` for texts."""
        return Apply(self.module)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text that it takes."""
        return getattr(self.config, "longest", None) or self.config.max_position_embeddings

    @property
    def family(self) -> Family:
        """What is known of all models of its `model_type`."""
        return family_of(self.settings)


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    scan: bool = False,
    remat: bool | str = False,
    as_stored: bool = False,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    rules: Mapping[str, PartitionSpec] | None = None,
) -> Pretrained:
    """Read a published model of one of the families here: see `models.families.FAMILIES`.

    Args:
      path: a directory in Hugging Face's layout (config.json, and safetensors in one or more
        files), or a GGUF file of a decoder.
      dtype: dtype of parameters and computation: float32, bfloat16 or float16. By default the
        widest in the file; GGUF's quantized tensors are read as float32. Directories with a
        `quantization_config` (bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8) need a `dtype`, to
        which they are dequantized, or `quantize`.
      scan: stack the layers, as in `DecoderConfig`.
      remat: which activations are recomputed, as in `DecoderConfig`: True, False, or a name.
      as_stored: keep the dtype that each parameter has in the file; `dtype` is then that of the
        computation only.
      quantize: "keep" for parameters as they are in the file: quantized ones become
        `QuantizedWeight`s of the same codes, which stand for weights of `dtype`; floating ones keep
        their dtype, as with `as_stored`. Types without a kind here are read as floats, with a
        warning. Or the kind into which the kernels of all linear layers are quantized while they
        are read, such as "nf4": one part of a tensor is in memory beside the codes. As in QLoRA,
        embeddings and the output head stay as they are, tied or not, and so do norms, biases and
        convolutions. A
        mapping `{the end of a path, a module (PyTorch's names too), a regex or "all-linear": kind}`
        can name them; the first entry that selects a weight decides, and None leaves the weight as
        it is. The model is then `lora_jax.lora(model.apply)`. By default quantized tensors are
        dequantized.
      mesh: of devices, on which the parameters are sharded: each process reads only its own shards,
        one part of a tensor at a time. By default all are on the default device.
      rules: how parameters are sharded, `{the end of a path, a module or a regex: PartitionSpec}`,
        by default `models.RULES`: Megatron's axes along "tensor", the other ones along "fsdp".
        Axes that the mesh does not have, or that do not divide a size, are left out.

    Returns:
      The model, with its parameters where `mesh` says.

    Raises:
      FileNotFoundError: the path does not exist, or the directory has no weights.
      ConfigError: `mesh` is not a mesh of devices, or a rule does not fit a parameter; or
        `quantize` is unknown, cannot keep stacked layers that are quantized in several ways, or has
        blocks that do not divide a weight or its shards.
      TargetError: an entry of `quantize` selects no weight.
      ValueError: the kind of model is unknown, the model refuses the configuration, or tensors are
        missing, unexpected or of another shape (all of them are listed); or a file is damaged.
    """
    if rules is not None and mesh is None:
        raise ConfigError("rules: say how parameters lie on a mesh, so give mesh= too")
    kinds = None if quantize in (None, KEEP) else parse_quantize(quantize)
    source = _open(Path(path))
    if source.quantized and dtype is None and quantize is None:
        raise ConfigError(
            f"{path}: its weights are quantized ({shown(source.quantized)}): pass quantize='keep' "
            "to keep their codes, or dtype= such as 'bfloat16' to dequantize them"
        )
    with _naming_file(path):
        module, like = _outline(source, dtype, scan, remat, as_stored)
        if mesh is not None:
            like = _on_mesh(like, sharding_rules.shardings(like, mesh, rules, module.config))
        if kinds is not None:
            like = quantized_shapes(like, source.naming, kinds)
        elif quantize == KEEP:
            warn_of_floats(path, source.tensors.values())
            like = kept_shapes(source.naming, source.tensors, like)
        params = names.to_tree(source.naming, source.tensors, like, ignore=source.ignored)
    return _pretrained(source, module, params)


def open_stored(path: str | Path, *, scan: bool = False) -> Pretrained:
    """Return what `load` returns with `as_stored`, but with parameters that stay in their files.

    They are `StoredLeaf`s: `np.asarray` reads one, and `models.save` one after the other.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    source = _open(Path(path))
    with _naming_file(path):
        module, like = _outline(source, None, scan, False, as_stored=True)
        params = names.to_stored_tree(source.naming, source.tensors, like, ignore=source.ignored)
    return _pretrained(source, module, params)


@contextlib.contextmanager
def _naming_file(path: str | Path) -> Iterator[None]:
    """Give the errors within the block the name of the file."""
    try:
        yield
    except (ConfigError, TargetError):
        raise  # of an argument, not of the file
    except StructureError as error:
        lines = str(error).replace("\n", "\n  ")
        problem = f"{path}: tensors and configuration do not match:\n  {lines}"
        raise ModelFileError(problem) from error
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _outline(
    source: "_Source", dtype: Any, scan: bool, remat: bool | str, as_stored: bool
) -> tuple[nn.Module, Any]:
    """Return the module, and the shapes and dtypes of its parameters."""
    _check_dtypes(source)
    _check_sizes(source)
    dtype = _dtype(dtype, source.tensors.values())
    module = _module(source, dtype, scan=scan, remat=remat)
    like = _param_shapes(module, source.family.inputs(module), dtype)
    return module, _stored_shapes(source, like) if as_stored else like


def _pretrained(source: "_Source", module: nn.Module, params: Any) -> Pretrained:
    leaves, _ = flatten_with_paths(params, is_leaf=is_quantized)
    places = source.naming.places({path: leaf.shape for path, leaf in leaves.items()})
    of_leaves = {name for x in places.values() for _, names in x.layers() for name in names}
    rest = {
        name: tensor
        for name, tensor in source.tensors.items()
        if name not in of_leaves
        and any(re.fullmatch(pattern, name) for pattern in source.family.kept)
    }
    return Pretrained(
        source.family.kind,
        module.config,
        module,
        params,
        source.torch,
        source.settings,
        rest,
        source.family.in_files(source.tensors) if source.family.in_files else None,
    )


def naming_of(path: str | Path) -> Naming:
    """Return the naming that `load` would return, without reading any weights.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    return _open(Path(path)).torch


@dataclass(frozen=True)
class _Source:
    """A file or directory whose weights have not been read yet."""

    family: Family
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]
    naming: Naming  # the names in the file
    torch: Naming  # Hugging Face's names
    ignored: tuple[str, ...]
    headless: bool = False  # it has no output head, although its settings say so
    quantized: str | None = None  # how, by config.json


def _open(path: Path) -> _Source:
    if path.is_file():
        settings, quantized = gguf.read_model(path)
        family = _family(settings, path)
        torch = family.naming(())
        in_file = gguf.file_naming(torch, settings)
        ignored = (*gguf.IGNORED, *family.kept)
        return _Source(family, settings, quantized, in_file, torch, ignored)
    config = hf_directory.read_config(path)
    family = _family(config, path)
    opened = published.open_directory(path, config)
    settings, tensors = opened.settings, opened.tensors
    torch = family.naming(tensors)
    in_files = family.in_files(tensors) if family.in_files else torch
    tied = (TIED_HEAD,) if is_tied(settings) else ()
    # a decoder's classifier has no output head: the model here gets that of a tied one
    headless = not tied and "score.weight" in tensors and "lm_head.weight" not in tensors
    ignored = (*family.dropped, *tied, *family.kept, *opened.ignored)
    return _Source(family, settings, tensors, in_files, torch, ignored, headless, opened.method)


def _family(settings: Mapping[str, Any], path: Path) -> Family:
    try:
        return family_of(settings)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _check_sizes(source: _Source) -> None:
    """Refuse sizes that exceed the file, before anything is allocated."""
    numbers = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    sizes = {name: n for name, n in _flat(source.settings) if is_integer(n)}
    sizes["num_attention_heads * head_dim"] = math.prod(
        sizes.get(name, 1) for name in ("num_attention_heads", "head_dim")
    )
    limits = dict.fromkeys(source.family.sizes, numbers)
    for name, limit in (limits | dict.fromkeys(source.family.layers, len(source.tensors))).items():
        if sizes.get(name, 0) > limit:
            size = shown_value(sizes[name])
            raise ModelFileError(f"{name} is {size}, but the files contain only {limit}")


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config.json and, as "a.b", those of the objects in it."""
    for name, value in settings.items():
        yield name, value
        for inner, x in value.items() if isinstance(value, Mapping) else ():
            yield f"{name}.{inner}", x


def _check_dtypes(source: _Source) -> None:
    """Refuse floating dtypes that are parts of a quantization: alone they mean nothing."""
    other = {
        name: str(x.dtype)
        for name, x in source.tensors.items()
        if jnp.issubdtype(x.dtype, jnp.floating) and str(x.dtype) not in _STORED_DTYPES
    }
    if other:
        name, dtype = next(iter(other.items()))
        raise ModelFileError(
            f"{len(other)} of {len(source.tensors)} tensors are {dtype} or the like, first "
            f"{shown(name)}, but config.json has no quantization_config. All must be "
            f"{', '.join(_STORED_DTYPES)}; where several are mixed, the widest is used"
        )


_STORED_DTYPES = (*PARAM_DTYPES, "float64")


def _dtype(dtype: Any, tensors: Iterable[Any]) -> str:
    """Return the name of the requested dtype, or of the widest among the tensors."""
    if dtype is None:
        stored = {x.dtype for x in tensors if jnp.issubdtype(x.dtype, jnp.floating)}
        if not stored or np.dtype("float64") in stored:
            return "float32"
        return str(jnp.result_type(*stored))
    name = str(jnp.dtype(dtype))
    if name not in PARAM_DTYPES:
        raise ValueError(f"dtype {name} is not one of {', '.join(PARAM_DTYPES)}")
    return name


def _module(source: _Source, dtype: str, *, scan: bool, remat: bool | str) -> nn.Module:
    headless = {"tie_word_embeddings": True} if source.headless else {}
    options = Options(dtype, scan, remat)
    decided = source.family.by_tensors(source.tensors)
    return source.family.module({**source.settings, **headless, **decided}, options)


def _param_shapes(module: nn.Module, inputs: Mapping[str, Any], dtype: str) -> Any:
    """Return the shapes of a module's parameters, without allocating them."""
    params = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def _on_mesh(like: Any, shardings: Any) -> Any:
    """Return the shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings,
    )


def _stored_shapes(source: _Source, like: Any) -> Any:
    """Return the shapes with the dtypes in the file, the widest of a leaf's tensors."""
    leaves, treedef = flatten_with_paths(like)
    places = source.naming.places({path: leaf.shape for path, leaf in leaves.items()})

    def one(path: str, leaf: Any) -> Any:
        layers = places[path].layers() if path in places else ()
        found = [source.tensors[n] for _, ns in layers for n in ns if n in source.tensors]
        dtype = _dtype(None, found) if found else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_unflatten(treedef, [one(p, x) for p, x in leaves.items()])
