"""One random configuration: what transformers computes, and what is computed and saved here."""

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from lora_jax import models
from lora_jax.files.disk import safetensors_file
from tests.stress.other_configs.draw import Draw, shortened

Arrays = Mapping[str, np.ndarray]
#: The largest difference that rounding makes, of values up to 1 and relative to larger ones.
TOLERANCE = 1e-4
_AGAIN = 1e-6  # of the same values at other places in memory


@dataclass(frozen=True)
class Case:
    """A random model of transformers, and how to compute the same there and here.

    Attributes:
      model: in float32.
      inputs: by name.
      theirs: `(model, inputs) -> outputs`.
      ours: `(pretrained, inputs) -> outputs`, with the parameters as in `pretrained.params`. What
        it raises as `ValueError` refuses the configuration too.
      draw: what it was made by. One of its unusual fields must be named where the configuration
        is refused.
    """

    model: torch.nn.Module
    inputs: Arrays
    theirs: Callable[[Any, Arrays], Arrays]
    ours: Callable[[models.Pretrained, Arrays], Arrays]
    draw: Draw


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `sort` is "equal", "refused", or a problem."""

    sort: str
    text: str = ""
    apart: float = 0.0

    @property
    def is_problem(self) -> bool:
        return self.sort not in ("equal", "refused")


def outcome(case: Case) -> Outcome:
    """Return what becomes of a case, with layers stacked or not."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        there, again = Path(folder) / "there", Path(folder) / "again"
        case.model.eval().save_pretrained(there)
        config = there / "config.json"
        if case.draw.random.random() < 0.5:
            config.write_text(shortened(case.draw, config.read_text()))
        wanted = case.theirs(case.model, case.inputs)
        try:
            pretrained = models.load(there, scan=case.draw.random.random() < 0.5)
            found = case.ours(pretrained, case.inputs)
        except ValueError as error:
            return _refused(str(error), case.draw.changed)
        apart = max(_apart(found[key], x) for key, x in wanted.items())
        if not apart <= TOLERANCE:
            return Outcome("differs", f"{apart:.1e}", apart)
        models.save(again, pretrained)
        if (problem := _files_apart(there, again)) is not None:
            return Outcome("saved", problem)
        reloaded = type(case.model).from_pretrained(again, attn_implementation="eager").eval()
        after = case.theirs(reloaded, case.inputs)
        if any(_apart(after[key], x) > _AGAIN for key, x in wanted.items()):
            return Outcome("reloaded", "transformers computes something else after saving")
        return Outcome("equal", apart=apart)


def _refused(message: str, changed: Mapping[str, Any]) -> Outcome:
    line = re.sub(r"^\S*/there(/\S*)?: ", "", message)
    named = [name for name in changed if name in line]
    if "\n" in line or not named:
        return Outcome("unclear", line)
    return Outcome("refused", line)


def _apart(found: Any, wanted: np.ndarray) -> float:
    found = np.asarray(found, np.float32)
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.max(np.abs(found - wanted) / np.maximum(1, np.abs(wanted)), initial=0))


def _files_apart(one: Path, other: Path) -> str | None:
    (first, _), (second, _) = (
        safetensors_file.read(folder / "model.safetensors") for folder in (one, other)
    )
    if first.keys() != second.keys():
        return f"names differ: {sorted(first.keys() ^ second.keys())[:3]}"
    for name, x in first.items():
        if x.dtype != second[name].dtype or x.tobytes() != second[name].tobytes():
            return f"{name} differs"
    return None


def run(function: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Compute a function of parameters and arrays, compiled quickly."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(params, *args)
