"""The base that an adapter file itself implies, for conversions without the base model.

A file of a PyTorch library is read onto a tree that has PyTorch's names as its paths and PyTorch's
axes. A native file describes the shapes of its base.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.errors import AdapterFileError
from lora_jax.core.layout import Layout
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight, TrainedRows
from lora_jax.files import diffusion, gguf, kinds, mlx, native, peft
from lora_jax.files.naming import Entry, Naming
from lora_jax.files.peft import PeftConfig
from lora_jax.files.peft.wrong_names import rules_of_format
from lora_jax.files.torch_adapters.contents import TorchBase
from lora_jax.files.torch_adapters.file_contents import ImpliedWeight
from lora_jax.files.torch_adapters.rename import describe


@dataclasses.dataclass(frozen=True)
class NamedAdapters:
    """Adapters, and the names under which they can be written."""

    adapters: Any  # an overlay of `base`
    base: Any  # a tree of shapes
    naming: Naming
    base_name: str | None = None
    config: PeftConfig | None = None
    complete: bool = False  # whether `base` has all leaves, not the adapted ones alone
    llama_cpp: gguf.Names | None = None  # what llama.cpp calls the model
    architecture: str | None = None  # a key of `diffusion.ARCHITECTURES`


def base_name(found: kinds.Found) -> str | None:
    """Return the name of the model that an adapter was made for, where its file says it."""
    if found.kind == kinds.NATIVE:
        return native.read_file(found.path).base_model
    if found.kind == kinds.PEFT:
        return peft.read_config(found.path).base_model_name_or_path
    if found.kind in kinds.OF_IMAGES:
        return None
    if found.kind == kinds.GGUF_ADAPTER:
        return gguf.read_file(found.path).base_model
    return mlx.read_file(found.path).base_model


def from_peft(
    path: Path,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    residual: bool = False,
) -> NamedAdapters:
    """Read a PEFT adapter onto the modules that it names; the options are those of `peft.load`."""
    file = peft.read_file(path)
    file = file.rename(rename) if rename else file
    rules = rules_of_format(file.tensors)
    if rules and strict:
        raise AdapterFileError(f"{file.source}: {describe(rules, file.tensors)}")
    contents = file.contents()
    contents = contents.require_whole(path) if strict else contents
    base, naming = _torch_tree(contents.weights)
    adapters = peft.fit(file, base, naming, strict=strict, residual=residual)
    return NamedAdapters(adapters, base, naming, contents.base_model, file.config)


def from_mlx(
    path: Path, *, strict: bool = True, rename: Mapping[str, str] | None = None
) -> NamedAdapters:
    """Read an mlx-lm adapter onto the modules that it names; the options are `mlx.load`'s."""
    file = mlx.read_file(path)
    file = file.rename(rename) if rename else file
    contents = file.contents()
    contents = contents.require_whole(path) if strict else contents
    base, naming = _torch_tree(contents.weights)
    adapters = mlx.fit(file, base, naming, strict=strict)
    return NamedAdapters(adapters, base, naming, contents.base_model)


def from_images(
    path: Path,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    full_rank: int | None = None,
) -> NamedAdapters:
    """Read a LoRA file of an image generator onto the published model whose names it has.

    The names of its modules begin with the component. The options are those of `diffusion.load`. A
    directory with a PEFT adapter for each component is read as such a file.
    """
    if path.is_dir():
        return _from_components(path, strict=strict, rename=rename)
    file = diffusion.read_file(path)
    file = file.rename(rename) if rename else file
    architecture, components = diffusion.find_architecture(file)
    base, naming = _torch_tree(diffusion.weights(architecture, components))
    adapters = diffusion.fit(file, base, naming, strict=strict, full_rank=full_rank)
    return NamedAdapters(adapters, base, naming, complete=True, architecture=architecture)


def _from_components(
    path: Path, *, strict: bool, rename: Mapping[str, str] | None
) -> NamedAdapters:
    """Read the PEFT adapters of a pipeline's components from the directories within one."""
    overlay: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    components = kinds.components_in(path)
    for component in components:
        read = from_peft(path / component, strict=strict, rename=rename)
        for name, node in adapted_nodes(read.adapters).items():
            overlay[f"{component}.{name}"] = node
            shapes[f"{component}.{name}"] = read.base[name].shape
    try:
        architecture, _ = diffusion.find_component(shapes)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error}") from None
    base, naming = _torch_tree(diffusion.weights(architecture, components))
    adapters = dict.fromkeys(base) | overlay
    return NamedAdapters(adapters, base, naming, complete=True, architecture=architecture)


def in_pipeline(adapters: NamedAdapters) -> NamedAdapters:
    """Return adapters of a published image generator as `from_images` does.

    Raises:
      AdapterFileError: their names and shapes are not those of a published model.
    """
    if adapters.architecture is not None:
        return adapters
    model, nodes = TorchBase(adapters.base, adapters.naming), adapted_nodes(adapters.adapters)
    places = {name: where[0][0].path for name, where in model.index.items()}
    shapes = {name: model.shape(name) for name, path in places.items() if path in nodes}
    architecture, component = diffusion.find_component(shapes)
    found = dataclasses.replace(adapters, architecture=architecture)
    if not component:
        return found
    if any(name != path for name, path in places.items()):
        return dataclasses.replace(found, naming=adapters.naming.with_prefix(f"{component}."))
    base, naming = _torch_tree(diffusion.weights(architecture, [component]))
    overlay = dict.fromkeys(base) | {f"{component}.{name}": nodes[name] for name in shapes}
    return dataclasses.replace(found, adapters=overlay, base=base, naming=naming, complete=True)


def by_component(adapters: NamedAdapters) -> dict[str, NamedAdapters]:
    """Return what `from_images` returns for each component, under the names within it."""
    components = dict.fromkeys(x.partition(".")[0] for x in adapted_nodes(adapters.adapters))
    found = {}
    for component in components:
        names = [name for name in adapters.base if name.startswith(f"{component}.")]
        local = {name: name.removeprefix(f"{component}.") for name in names}
        rows = {row.torch: row for row in adapters.naming.entries}
        shapes = {name: adapters.base[name].shape for name in names}
        base, naming = _torch_tree({local[n]: (rows[n].kind, shapes[n]) for n in names})
        overlay = {local[name]: adapters.adapters[name] for name in names}
        found[component] = dataclasses.replace(
            adapters, adapters=overlay, base=base, naming=naming, architecture=None
        )
    return found


def from_native(path: Path, naming: Naming) -> NamedAdapters:
    """Read a native file onto the base that its header describes, or its factors imply."""
    file = native.read_file(path)
    described = file.base_shapes()
    base = dict(described)
    for leaf, node in file.nodes.items():
        if leaf in base:
            continue  # saved without its base; a fully trained leaf is never described
        if isinstance(node, TrainedRows):
            raise AdapterFileError(
                f"{path}: trained rows of {leaf}, but not the size of the embedding: save the "
                "adapters again with save(..., base=base)"
            )
        base[leaf] = jax.ShapeDtypeStruct(node.shape, np.float32)
    config = PeftConfig(use_rslora=True) if file.use_rslora else None
    return NamedAdapters(
        native.fit(file, base), base, naming, file.base_model, config, complete=bool(described)
    )


def align_sides(adapters: NamedAdapters, kinds: Mapping[str, str]) -> NamedAdapters:
    """Return adapters whose linear modules have the axes that they have in other adapters' base.

    A file of PEFT says only once whether its modules are `Linear` or GPT-2's `Conv1D`, whose weight
    is transposed, and says `Conv1D` where only some are. The factors are the same.

    Args:
      adapters: read onto the modules that their file names.
      kinds: the kinds of the modules' weights, as in `Entry.kind`, by path.
    """
    base, overlay, rows = dict(adapters.base), dict(adapters.adapters), []
    for row in adapters.naming.entries:
        (path,) = row.paths
        kind = kinds.get(path, row.kind)
        if {kind, row.kind} != {"linear", "conv1d"}:
            rows.append(row)
            continue
        rows.append(_row(path, kind, 2))
        base[path] = jax.ShapeDtypeStruct(base[path].shape[::-1], base[path].dtype)
        if isinstance(overlay[path], LoraWeight):
            layout = Layout("oi" if kind == "linear" else "io")
            overlay[path] = dataclasses.replace(overlay[path], layout=layout)
    return dataclasses.replace(adapters, base=base, adapters=overlay, naming=Naming(tuple(rows)))


def _row(name: str, kind: str, ndim: int) -> Entry:
    """Return the row of a weight whose path is its name in PyTorch."""
    axes = "o i" + "".join(f" k{n}" for n in range(ndim - 2))
    return Entry(name, name, kind, f"{axes} -> {axes}" if kind in ("linear", "conv") else "")


def _torch_tree(
    weights: Mapping[str, ImpliedWeight],
) -> tuple[dict[str, jax.ShapeDtypeStruct], Naming]:
    """Return a flat tree that has PyTorch's names as paths and PyTorch's axes, and its naming."""
    rows = [_row(name, kind, len(shape)) for name, (kind, shape) in weights.items()]
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, (_, shape) in weights.items()}
    return tree, Naming(tuple(rows))
