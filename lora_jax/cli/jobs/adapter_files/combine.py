"""What `lora-jax combine` does: read adapters onto one tree, combine them, and write the result."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax import models
from lora_jax.adapters.algebra.methods import METHODS
from lora_jax.cli.classifiers import LABELS, POOLING
from lora_jax.cli.errors import ConversionError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs.adapter_files import convert
from lora_jax.cli.options import refuse_existing
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight
from lora_jax.files import implied_tree, kinds, peft
from lora_jax.files.disk.fingerprint import differences
from lora_jax.files.implied_tree import NamedAdapters
from lora_jax.files.naming import Entry, Naming


@dataclasses.dataclass(frozen=True)
class Sources:
    """What is combined, and how it is read; the fields are the command's options."""

    adapters: Sequence[Path]
    model: str | None
    naming: Path | None
    fit: Fit


@dataclasses.dataclass(frozen=True)
class How:
    """How it is combined; the fields are the command's options."""

    weights: str | None
    method: str | None
    density: float | None
    rank: int | None
    energy: float | None
    majority_sign: Any
    exact: bool
    seed: int


def run(sources: Sources, how: How, to: str | None, out: Path, *, force: bool) -> None:
    """Combine adapters and write the result; see the command's help.

    Raises:
      ConversionError: an option is wrong or missing, or the adapters cannot be combined.
      OutputError: something exists at `out`, without `force`.
      LoraError: an adapter or the model cannot be read, or they do not fit each other.
    """
    found = [kinds.adapter(path) for path in sources.adapters]
    to = convert.FORMAT_OF[found[0].kind] if to is None else to
    weights, method = _weights(how.weights, len(found)), _method(how)
    _check(found, to, sources)
    refuse_existing(out, force)
    metadata = _metadata(found)
    every = _read(found, to, sources)
    first = every[0]
    base, naming = _common_base(every, sources.adapters)
    options = {"method": method, "density": how.density, "rank": how.rank, "base": base}
    try:
        combined = lora.combine(
            [one.adapters for one in every],
            weights,
            majority_sign=how.majority_sign,
            exact=how.exact,
            key=jax.random.key(how.seed),
            **options,
        )
        kept: dict[str, float] = {}
        if how.energy is not None:
            combined, kept = lora.compress(combined, energy=how.energy)
    except (ConfigError, StructureError) as error:
        raise ConversionError(_in_options(str(error))) from error
    config = first.config and dataclasses.replace(first.config, use_rslora=False)
    result = dataclasses.replace(
        first,
        adapters=combined,
        base=base,
        naming=naming,
        base_name=_base_name(every),
        config=config,
    )
    convert.write(result, to, out, metadata)
    _tell(out, to, combined, method, len(every), kept)


def _weights(text: str | None, count: int) -> list[float]:
    """Return the numbers of --weights, one per adapter."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise ConversionError(
            f"--weights {shown(text)}: must be one number per adapter, separated by commas, here "
            f"{count}"
        )
    return weights


def _method(how: How) -> str:
    """Return the method, after a check of the options that go with it."""
    method = how.method or ("cat" if how.rank is None else "svd")
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ConversionError(f"--method {shown(method)}: must be one of {known}")
    row = METHODS[method]
    if how.rank is not None and row.sums != "updates":
        raise ConversionError(f"--rank: {method} has no rank to choose; use a method ending in svd")
    if row.keeps != "all" and how.density is None:
        raise ConversionError(f"--method {method} needs --density, the share of elements to keep")
    if row.keeps == "all" and how.density is not None:
        raise ConversionError(f"--density: {method} keeps all elements; leave it out")
    return method


def _check(found: Sequence[kinds.Found], to: str, sources: Sources) -> None:
    """Raise unless the names and values that are needed are given."""
    for one in found:
        sources.fit.refuse_unused(one)
        changed = convert.find_changed_base(one, sources.fit)
        if changed and not sources.model:
            raise ConversionError(
                f"{one.path}: {changed} changed the base that it was trained on: give the original "
                "base with --model, or --residual if all are for the changed one"
            )
    convert.check_gguf(found, to, sources.model)
    own = [one.kind == kinds.NATIVE for one in found]
    if sources.model and sources.naming:
        raise ConversionError("give either --model, which brings its naming, or --naming, not both")
    if sources.naming and not all(own):
        raise ConversionError("--naming is only for lora_jax adapters: others have PyTorch's names")
    if sources.model:
        return
    if any(own) and not all(own):
        raise ConversionError(
            "lora_jax adapters have the paths of a JAX tree, and the others PyTorch's names: give "
            "the base with --model"
        )
    if (to == "native") != all(own) and not sources.naming:
        raise ConversionError(
            f"from {kinds.DESCRIPTIONS[found[0].kind]} to {to}: names and axes of the model are "
            "needed; give the base with --model"
        )


def _read(found: Sequence[kinds.Found], to: str, sources: Sources) -> list[NamedAdapters]:
    """Read all adapters, onto the model if it is given, or else onto what their files imply."""
    fit = sources.fit
    if sources.model is None:
        naming = Naming(()) if sources.naming is None else convert.read_naming(sources.naming)
        read = [_read_alone(one, naming, fit) for one in found]
        if found[0].kind != kinds.NATIVE:
            return _aligned(read)
        _check_same_base(found)
        return read
    from lora_jax.cli import sources as files

    place = files.find_model(sources.model)
    model = files.load_model(place, scan=any(map(files.is_stacked, found)))
    names = models.gguf_names(model) if to == "gguf" else None
    read = []
    for one in found:
        loaded = files.put_on(model, one, fit)
        config = peft.read_config(one.path) if one.kind == kinds.PEFT else None
        name = implied_tree.base_name(one) or sources.model
        params, naming = loaded.model.params, loaded.model.naming
        read.append(NamedAdapters(loaded.adapters, params, naming, name, config, True, names))
    return read


def _aligned(every: Sequence[NamedAdapters]) -> list[NamedAdapters]:
    """Return adapters that agree in which axis of a linear module is which."""
    aligned: list[NamedAdapters] = []
    kinds_of: dict[str, str] = {}
    for one in every:
        aligned.append(implied_tree.align_sides(one, kinds_of))
        rows = aligned[-1].naming.entries
        kinds_of = {path: row.kind for row in rows for path in row.paths} | kinds_of
    return aligned


def _read_alone(found: kinds.Found, naming: Naming, fit: Fit) -> NamedAdapters:
    if found.kind == kinds.NATIVE:
        return implied_tree.from_native(found.path, naming)
    options: dict[str, Any] = {"strict": fit.strict, "rename": fit.rename}
    if found.kind in kinds.OF_IMAGES:
        return implied_tree.from_images(found.path, **options, full_rank=fit.full_rank)
    if found.kind == kinds.MLX:
        return implied_tree.from_mlx(found.path, **options)
    return implied_tree.from_peft(found.path, **options, residual=fit.residual)


def _common_base(every: Sequence[NamedAdapters], paths: Sequence[Path]) -> tuple[Any, Naming]:
    """Return the base of all adapters: the model, or all that their files imply."""
    first = every[0]
    if first.complete and all(one.base is first.base for one in every):
        return first.base, first.naming
    base: dict[str, Any] = {}
    rows: dict[Any, Entry] = {}
    owner: dict[str, Path] = {}
    for one, path in zip(every, paths, strict=True):
        for name, shape in one.base.items():
            if name in base and base[name].shape != shape.shape:
                raise ConversionError(
                    f"{path}: {shown(name)} has the shape {shape.shape}, and {base[name].shape} in "
                    f"{owner[name]}: they are adapters of different models"
                )
            base.setdefault(name, shape)
            owner.setdefault(name, path)
        for row in one.naming.entries:
            rows.setdefault((row.torch, row.path), row)
    return base, Naming(tuple(rows.values()))


def _metadata(found: Sequence[kinds.Found]) -> dict[str, Any]:
    """Return what the first file of lora_jax says about its adapter, as a classifier's labels.

    Raises:
      ConversionError: the labels of another file are not the same.
    """
    own = [one for one in found if one.kind == kinds.NATIVE]
    every = [lora.read_metadata(one.path)["metadata"] for one in own]
    for one, metadata in zip(own, every, strict=True):
        for field in (LABELS, POOLING):  # of a classifier
            if metadata.get(field) != every[0].get(field):
                raise ConversionError(
                    f"{one.path}: has the {field} {shown(metadata.get(field))}, and {own[0].path} "
                    f"{shown(every[0].get(field))}"
                )
    return every[0] if every else {}


def _check_same_base(found: Sequence[kinds.Found]) -> None:
    """Raise if files of lora_jax say that their adapters were trained on different weights."""
    bases = [lora.read_metadata(one.path)["base"] or {} for one in found]
    known = [(one, base) for one, base in zip(found, bases, strict=True) if base]
    for one, base in known[1:]:
        lines = differences(known[0][1], base)
        if lines:
            raise ConversionError(
                f"{one.path}: was trained on another base than {known[0][0].path}:\n"
                + grouped(lines)
            )


def _base_name(every: Sequence[NamedAdapters]) -> str | None:
    """Return the name of the base, with a warning if the files name several."""
    names = list(dict.fromkeys(one.base_name for one in every if one.base_name))
    if len(names) > 1:
        print(
            f"warning: the adapters name different bases: {shown(', '.join(names))}; the result "
            f"names {shown(names[0])}",
            file=sys.stderr,
        )
    return names[0] if names else None


def _in_options(message: str) -> str:
    """Return a message of `combine` or `compress` in the words of the command line."""
    for python, option in {
        "pass base=, the parameters": "give the base with --model",
        "with base=": "and give the base with --model",
        "combine: ": "",
        "compress: energy": "--energy",
        "adapters[": "adapter [",
    }.items():
        message = message.replace(python, option)
    return message


def _tell(
    out: Path, to: str, combined: Any, method: str, count: int, kept: dict[str, float]
) -> None:
    """Print what was written."""
    nodes = [x for x in adapted_nodes(combined).values() if isinstance(x, LoraWeight)]
    ranks = sorted({node.rank for node in nodes})
    span = "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    kind = "folded PEFT adapter" if to == "folded" else kinds.DESCRIPTIONS[convert.KIND_OF[to]]
    what = f"{method} of {count} adapters" if count > 1 else f"{method} of one adapter"
    print(f"wrote {escaped(str(out))}: {kind}, {what}, {len(nodes)} weights of rank {span}")
    if kept:
        worst = min(kept, key=lambda path: kept[path])
        print(f"kept of the squared updates: at least {kept[worst]:.2%} ({shown(worst)})")
