"""Adapters under kohya's names: LoRA's factors, and LyCORIS' differences of whole tensors."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from lora_jax.core.errors import StructureError, grouped
from lora_jax.files.diffusion.components import underscored
from lora_jax.files.diffusion.index import Index
from lora_jax.files.diffusion.originals import written
from lora_jax.files.diffusion.read import swap_halves
from lora_jax.files.peft.config_from_contents import alpha_of
from lora_jax.files.torch_adapters.contents import Contents, TorchBase, module_of
from lora_jax.files.torch_adapters.factors import TorchFactors, concatenate, join_factors


@dataclasses.dataclass(frozen=True)
class Written:
    """One module of a file: its name there, and the base's modules that it joins.

    `halves` says that the two halves of its outputs are in the other order in the file.
    """

    name: str
    modules: tuple[str, ...]
    halves: bool = False


@dataclasses.dataclass(frozen=True)
class KohyaTensors:
    """The tensors of a file, and the factors among them by the file's names of the modules."""

    tensors: dict[str, np.ndarray]
    factors: dict[str, TorchFactors]


def to_kohya(contents: Contents, model: TorchBase, layouts: Mapping[str, str]) -> KohyaTensors:
    """Return what a file of these contents holds.

    Args:
      contents: factors of linear layers and convolutions, and fully trained tensors.
      model: their base.
      layouts: "diffusers" or "original", by component.

    Raises:
      StructureError: the file cannot hold them; all problems are listed.
    """
    found, problems = KohyaTensors({}, {}), list[str]()
    modules = dict.fromkeys(module_of(name) for name in (*contents.factors, *contents.whole))
    names: dict[Written, None] = {}
    index = Index(module_of(name) for name in model.index if name.endswith(".weight"))
    for module in modules:
        one = _name(module, model, layouts, index.components)
        if isinstance(one, str):
            problems.append(f"{module}: {one}")
            continue
        names[one] = None
        if module == one.modules[0] and len(index.candidates(one.name)) > 1:
            problems.append(
                f"{module}: its name in the file, {one.name}, is that of other modules too; pass "
                'style="diffusers"'
            )
    for one in names:
        try:
            factors = _joined(one, contents, model)
            if factors is not None:
                found.factors[one.name] = factors
                found.tensors.update(_factor_tensors(one.name, factors))
            found.tensors.update(_differences(one, contents, model))
        except _UnwritableError as error:
            problems.append(str(error))
    if problems:
        raise StructureError(
            f"save: the file cannot hold these adapters:\n{grouped(sorted(problems))}"
        )
    return found


class _UnwritableError(Exception):
    """What a file cannot hold."""


def _name(
    module: str, model: TorchBase, layouts: Mapping[str, str], components: Collection[str]
) -> Written | str:
    """Return a module's place in the file, or why it has none."""
    component, _, local = module.partition(".")
    first = underscored(component, components)[0]
    flat = lambda name: f"{first}_{name.replace('.', '_')}"
    if layouts[component] == "diffusers":
        if component == "transformer":
            first = "lora_transformer"
        return Written(flat(local), (module,))
    if component.startswith("text_encoder"):
        return Written(flat(local), (module,))
    rows = written(component, local)
    if not rows:
        return 'has no name in the original code; pass layout="diffusers"'
    row = rows[0]
    if len(rows) > 1:
        if model.adapted_only:
            return "pass base=, which shows whether its block has attention"
        block = re.sub(r"upsamplers.*", "attentions.", module)
        row = rows[not any(name.startswith(block) for name in model.index)]
    return Written(flat(row.name), tuple(f"{component}.{part}" for part in row.parts), row.halves)


def _joined(one: Written, contents: Contents, model: TorchBase) -> TorchFactors | None:
    """Return the factors of one module of the file, or None if it has none."""
    names = [f"{module}.weight" for module in one.modules]
    parts = [contents.factors.get(name) for name in names]
    if all(part is None for part in parts):
        return None
    widths = [_width(name, one, model) for name in names]
    try:
        joined = join_factors(parts, widths)
    except ValueError:
        raise _UnwritableError(
            f"{one.name}: joins {' and '.join(one.modules)}, of which only some have DoRA"
        ) from None
    assert joined is not None
    if one.halves:
        magnitude = None if joined.magnitude is None else swap_halves(joined.magnitude)
        joined = dataclasses.replace(joined, b=swap_halves(joined.b), magnitude=magnitude)
    return joined


def _width(name: str, one: Written, model: TorchBase) -> int:
    if name not in model.index:
        raise _UnwritableError(
            f"{one.name}: joins {' and '.join(one.modules)}, but {name} is not known; pass base="
        )
    return model.outputs(name)


def _factor_tensors(name: str, factors: TorchFactors) -> dict[str, np.ndarray]:
    """Return the tensors of one module's factors."""
    ones = (1,) * (factors.a.ndim - 2)
    alpha = alpha_of(factors.scale, factors.rank, False)
    found = {
        f"{name}.lora_down.weight": factors.a,
        f"{name}.lora_up.weight": factors.b.reshape(*factors.b.shape, *ones),
        f"{name}.alpha": np.asarray(alpha, "float32"),
    }
    if factors.magnitude is not None:
        found[f"{name}.dora_scale"] = factors.magnitude.reshape(-1, 1, *ones)
    return found


def _differences(
    one: Written, contents: Contents, model: TorchBase
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of what is fully trained in one module: differences from the base."""
    for leaf in ("weight", "bias"):
        names = [f"{module}.{leaf}" for module in one.modules]
        trained = [name in contents.whole for name in names]
        if not any(trained):
            continue
        if leaf == "weight" and any(name in contents.factors for name in names):
            raise _UnwritableError(
                f"{one.name}: joins {' and '.join(one.modules)}, of which some have factors and "
                'others are fully trained; pass layout="diffusers"'
            )
        joined = concatenate([_difference(name, contents, model) for name in names])
        joined = swap_halves(joined) if one.halves else joined
        yield f"{one.name}.{_field(one, leaf, model)}", joined


def _difference(name: str, contents: Contents, model: TorchBase) -> np.ndarray:
    value = model.value(name) if name in model.index else None
    if value is None:
        raise _UnwritableError(
            f"{name}: the file holds differences, and so needs its value: pass base= with arrays"
        )
    trained = contents.whole.get(name, value)
    dtype = np.result_type(np.float32, *(x.dtype for x in (value, trained) if x.dtype.kind == "f"))
    return (trained.astype("float64") - value.astype("float64")).astype(dtype)


def _field(one: Written, leaf: str, model: TorchBase) -> str:
    """Return LyCORIS' word for a difference of a weight or bias."""
    weight = f"{one.modules[0]}.weight"
    if model.kind(weight):
        return "diff" if leaf == "weight" else "diff_b"
    return "w_norm" if leaf == "weight" else "b_norm"
