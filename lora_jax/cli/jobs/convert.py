"""What `lora-jax convert` does: read an adapter onto a tree of shapes, and write it from there."""

import dataclasses
from pathlib import Path

import lora_jax as lora
from lora_jax.cli.errors import ConversionError
from lora_jax.cli.options import refuse_existing
from lora_jax.core.errors import ConfigError, LoraError, StructureError
from lora_jax.files import implied_tree, kinds, mlx, native, peft
from lora_jax.files.disk import strict_json
from lora_jax.files.implied_tree import NamedAdapters
from lora_jax.files.naming import Naming

_KIND_OF = {"peft": kinds.PEFT, "folded": kinds.PEFT, "mlx": kinds.MLX, "native": kinds.NATIVE}


def run(
    adapter: Path, to: str, out: Path, *, model: str | None, naming: Path | None, force: bool
) -> None:
    """Read `adapter` and write it to `out` in the format `to`; see the command's help.

    Raises:
      ConversionError: names and shapes are needed but not given.
      OutputError: something exists at `out`, without `force`.
    """
    found = kinds.adapter(adapter)
    _check(found, to, model, naming)
    refuse_existing(out, force)
    source = _read(found, to, model, naming)
    try:
        _write(source, to, out)
    except (ConfigError, StructureError) as error:
        raise ConversionError(f"{found.path}: cannot be converted: {error}") from error
    kind = "folded PEFT adapter" if to == "folded" else kinds.DESCRIPTIONS[_KIND_OF[to]]
    print(f"wrote {out}: {kind}")


def _check(found: kinds.Found, to: str, model: str | None, naming: Path | None) -> None:
    own = found.kind == kinds.NATIVE
    if to != "folded" and found.kind == _KIND_OF[to]:
        raise ConversionError(f"{found.path}: is already a {kinds.DESCRIPTIONS[found.kind]}")
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
    if naming and not own:
        raise ConversionError("--naming is only for lora_jax adapters: others have PyTorch's names")


def _read(found: kinds.Found, to: str, model: str | None, naming: Path | None) -> NamedAdapters:
    if naming is not None:
        return implied_tree.from_native(found.path, read_naming(naming))
    if model is not None:
        from lora_jax.cli import sources

        base = sources.find_model(model)
        if found.kind == kinds.NATIVE:
            source = implied_tree.from_native(found.path, sources.naming_of(base))
            return dataclasses.replace(source, base_name=source.base_name or model)
        if to == "native":
            loaded = sources.load(base, found.path)
            name = implied_tree.base_name(found) or model
            return NamedAdapters(loaded.adapters, loaded.model.params, loaded.model.naming, name)
    return (implied_tree.from_peft if found.kind == kinds.PEFT else implied_tree.from_mlx)(
        found.path
    )


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


def _write(source: NamedAdapters, to: str, out: Path) -> None:
    if to == "native":
        metadata = {native.MODEL: source.base_name} if source.base_name else {}
        lora.save(out, source.adapters, metadata, base=source.base)
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
