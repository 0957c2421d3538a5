"""What `lora-jax convert` does: read an adapter onto a tree of shapes, and write it from there."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax import models
from lora_jax.cli.errors import ConversionError
from lora_jax.cli.fit import Fit
from lora_jax.cli.options import refuse_existing
from lora_jax.core.errors import AdapterFileError, ConfigError, LoraError, StructureError
from lora_jax.core.foreign import escaped
from lora_jax.files import diffusion, gguf, implied_tree, kinds, mlx, native, peft
from lora_jax.files.disk import strict_json
from lora_jax.files.implied_tree import NamedAdapters
from lora_jax.files.naming import Naming
from lora_jax.files.peft import changed_base

KIND_OF = {
    "peft": kinds.PEFT,
    "folded": kinds.PEFT,
    "mlx": kinds.MLX,
    "native": kinds.NATIVE,
    "gguf": kinds.GGUF_ADAPTER,
    "kohya": kinds.KOHYA,
    "diffusers": kinds.DIFFUSERS,
}
FORMAT_OF = {
    kinds.PEFT: "peft",
    kinds.MLX: "mlx",
    kinds.NATIVE: "native",
    kinds.GGUF_ADAPTER: "gguf",
    kinds.KOHYA: "kohya",
    kinds.DIFFUSERS: "diffusers",
    kinds.PIPELINE: "peft",
}
#: By format, what reads it and knows no classifiers.
_WITHOUT_CLASSIFIERS = {"mlx": "mlx-lm", "gguf": "llama.cpp as an adapter"}


@dataclasses.dataclass(frozen=True)
class Source:
    """What is converted, and how it is read; the fields are the command's options."""

    adapter: Path
    model: str | None
    naming: Path | None
    fit: Fit


def run(source: Source, to: str, out: Path, *, force: bool) -> None:
    """Read an adapter and write it to `out` in the format `to`; see the command's help.

    Raises:
      ConversionError: names and shapes are needed but not given.
      OutputError: something exists at `out`, without `force`.
    """
    found = kinds.adapter(source.adapter)
    changed = find_changed_base(found, source.fit)
    _check(found, to, source, changed)
    refuse_existing(out, force)
    adapters = _read(found, to, source, changed)
    try:
        write(adapters, to, out)
    except (AdapterFileError, ConfigError, StructureError) as error:
        raise ConversionError(f"{found.path}: cannot be converted: {error}") from error
    kind = "folded PEFT adapter" if to == "folded" else kinds.DESCRIPTIONS[KIND_OF[to]]
    print(f"wrote {escaped(str(out))}: {kind}")


def find_changed_base(found: kinds.Found, fit: Fit) -> str | None:
    """Return the initialization that changed the base, if that is to be undone.

    Raises:
      ConversionError: it cannot be.
    """
    if found.kind != kinds.PEFT or fit.residual:
        return None
    config = peft.read_config(found.path)
    if config.changes_base and not changed_base.is_determined(config):
        raise ConversionError(f"{found.path}: {changed_base.cannot_recompute(config)}")
    return config.changes_base


def _check(found: kinds.Found, to: str, source: Source, changed: str | None) -> None:
    source.fit.refuse_unused(found)
    own, model, naming = found.kind == kinds.NATIVE, source.model, source.naming
    is_same = to != "folded" and found.kind == KIND_OF[to]
    if is_same and not (changed or source.fit.residual or source.fit.rename):
        raise ConversionError(f"{found.path}: is already a {kinds.DESCRIPTIONS[found.kind]}")
    if changed and not model:
        raise ConversionError(
            f"{found.path}: {changed} changed the base that it was trained on: give the original "
            "base with --model, or --residual if the result is for the changed one"
        )
    if model and naming:
        raise ConversionError("give either --model, which brings its naming, or --naming, not both")
    if own and not (model or naming):
        raise ConversionError(
            f"{found.path}: a lora_jax adapter has the paths of a JAX tree: give --model, or "
            "--naming FILE.json for a custom model"
        )
    if to == "native" and not model:
        raise ConversionError(
            "a lora_jax adapter has the paths and axes of a JAX tree: give the base with --model"
        )
    check_gguf([found], to, model)
    if found.kind in kinds.OF_IMAGES and (
        model or KIND_OF[to] not in (*kinds.OF_IMAGES, kinds.PEFT)
    ):
        raise ConversionError(
            f"{found.path}: is for an image generator, and becomes peft, folded, kohya or "
            "diffusers without --model; in Python lora.diffusion.load reads it onto any model"
        )
    if naming and not own:
        raise ConversionError("--naming is only for lora_jax adapters: others have PyTorch's names")


def check_gguf(found: Sequence[kinds.Found], to: str, model: str | None) -> None:
    """Raise if adapters come from GGUF or go there, and the model is not given.

    Raises:
      ConversionError: it is not.
    """
    own = [one.path for one in found if one.kind == kinds.GGUF_ADAPTER]
    if not model and (own or to == "gguf"):
        raise ConversionError(
            f"{(own or [found[0].path])[0]}: GGUF has llama.cpp's names, and its order of the rows "
            "of q and k: give the base with --model"
        )


def _read(found: kinds.Found, to: str, source: Source, changed: str | None) -> NamedAdapters:
    options: dict[str, Any] = {"strict": source.fit.strict, "rename": source.fit.rename}
    if source.naming is not None:
        return implied_tree.from_native(found.path, read_naming(source.naming))
    if source.model is not None:
        from lora_jax.cli import classifiers, sources

        base = sources.find_model(source.model)
        if found.kind == kinds.NATIVE:
            head = classifiers.naming_for_peft(base, found)
            if head is not None and to in _WITHOUT_CLASSIFIERS:
                raise ConversionError(
                    f"{found.path}: a sequence classifier, which {_WITHOUT_CLASSIFIERS[to]} lacks; "
                    "use --to peft"
                )
        if found.kind == kinds.NATIVE and to != "gguf":
            read = implied_tree.from_native(found.path, head or sources.naming_of(base))
            config = read.config
            if head is not None:
                config = dataclasses.replace(config or peft.PeftConfig(), task_type="SEQ_CLS")
            name = read.base_name or source.model
            return dataclasses.replace(read, base_name=name, config=config)
        if to in ("native", "gguf") or found.kind == kinds.GGUF_ADAPTER or changed:
            loaded = sources.load(base, found.path, fit=source.fit)
            name = implied_tree.base_name(found) or source.model
            config = peft.read_config(found.path) if found.kind == kinds.PEFT else None
            params, naming = loaded.model.params, loaded.model.naming
            names = models.gguf_names(loaded.model) if to == "gguf" else None
            return NamedAdapters(loaded.adapters, params, naming, name, config, True, names)
    if found.kind in kinds.OF_IMAGES:
        return implied_tree.from_images(found.path, **options, full_rank=source.fit.full_rank)
    if found.kind == kinds.MLX:
        return implied_tree.from_mlx(found.path, **options)
    return implied_tree.from_peft(found.path, **options, residual=source.fit.residual)


def read_naming(path: Path) -> Naming:
    """Read a naming's rows from a JSON file.

    Raises:
      ConversionError: it is not valid JSON, or a row is wrong.
    """
    rows = strict_json.parse_json(path.read_bytes(), str(path), ConversionError)
    try:
        return Naming.from_json(rows)
    except LoraError as error:
        raise ConversionError(f"{path}: {error}") from error


def write(
    source: NamedAdapters, to: str, out: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write adapters in the format `to`; `metadata` is for a file of lora_jax.

    Raises:
      LoraError: the format cannot hold them.
    """
    if to == "native":
        named = {native.MODEL: source.base_name} if source.base_name else {}
        lora.save(out, source.adapters, {**(metadata or {}), **named}, base=source.base)
    elif to == "gguf":
        assert source.llama_cpp is not None, "checked: the command needs --model"
        base, name = source.base, source.base_name
        gguf.save(out, source.adapters, source.llama_cpp, base=base, base_model=name)
    elif to in kinds.OF_IMAGES:
        _write_images(implied_tree.in_pipeline(source), to, out)
    elif source.architecture is not None and to in ("peft", "folded"):
        parts = implied_tree.by_component(source)
        for component, part in parts.items():
            write(part, to, out if len(parts) == 1 else out / component)
    elif to == "mlx":
        base, name = source.base, source.base_name
        mlx.save(out, source.adapters, source.naming, base=base, base_model=name)
    else:
        peft.save(
            out,
            source.adapters,
            source.naming,
            base=source.base,
            complete=source.complete,
            config=source.config,
            fold=to == "folded",
            base_model=source.base_name,
            task_type=source.config.task_type if source.config else None,
        )


def _write_images(source: NamedAdapters, to: str, out: Path) -> None:
    """Write adapters as a file for image generators, with the names that kohya's trainer uses."""
    architecture = diffusion.ARCHITECTURES[source.architecture or ""]
    named = {"ss_base_model_version": architecture.version} if to == kinds.KOHYA else {}
    diffusion.save(
        out,
        source.adapters,
        source.naming,
        base=source.base,
        style="kohya" if to == kinds.KOHYA else "diffusers",
        layout=architecture.layout,
        config=source.config,
        metadata=named,
    )
