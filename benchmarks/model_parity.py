"""The decoders beside transformers: logits, tokens, files, and PEFT's adapters both ways.

    python -m benchmarks.model_parity [llama gemma2 ...]

prints a Markdown table, one row per model of tests/models/fixtures that transformers recorded with
what it generates. With torch, transformers and peft installed each model is also trained here and
loaded in PEFT, changed there and loaded here, and merged and loaded in transformers, as
tests/parity/peft/check_models.py does; else those columns are empty.
"""

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import models
from lora_jax.files.disk import safetensors_file
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.families import family_of
from tests.models.recorded import FIXTURES, MIXED, expected

_HEAD = (
    "model_type",
    "transformers",
    "logits",
    "tokens",
    "saved",
    "to PEFT",
    "from PEFT",
    "merged",
)


def names() -> list[str]:
    """Return the recorded decoders."""
    found = [path.parent.name for path in sorted(FIXTURES.glob("*/expected.npz"))]
    return [name for name in found if family_of(_settings(name)).kind == "decoder"]


def _settings(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text())


def row(name: str, *, with_peft: bool) -> list[str]:
    """Return the cells of one model."""
    settings = _settings(name)
    logits, same = [], []
    for scan in (False,) if name == MIXED else (False, True):
        model = models.load(FIXTURES / name, scan=scan)
        logits.append(_logits_apart(name, model))
        same.append(_tokens_equal(name, model))
    with tempfile.TemporaryDirectory() as folder:
        models.save(folder, model)
        saved = _tensors(Path(folder)), _tensors(FIXTURES / name)
    is_saved = saved[0].keys() == saved[1].keys() and all(
        x.tobytes() == saved[1][key].tobytes() for key, x in saved[0].items()
    )
    label = settings["model_type"]
    label = f"{name} ({label})" if label != name else name
    version = settings.get("transformers_version", "")
    cells = [label, version, f"{max(logits):.0e}", _word(all(same)), _word(is_saved)]
    return cells + (_of_peft(name) if with_peft else ["", "", ""])


def _logits_apart(name: str, model: models.Pretrained) -> float:
    given = expected(name)
    found = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    apart = np.abs(np.asarray(found, np.float32) - given["logits"])
    return float(apart[given["mask"] > 0].max())


def _tokens_equal(name: str, model: models.Pretrained) -> bool:
    given, module = expected(name), model.module
    assert isinstance(module, Decoder)
    steps = given["greedy"].shape[1]
    cache = module.init_cache(len(given["ids"]), given["ids"].shape[1] + steps)
    found = models.generate(
        model.apply, model.params, given["ids"], cache, steps=steps, segments=given["mask"]
    )
    return bool(np.array_equal(found[:1], given["greedy"]))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors_file.read(path)[0]
    return found


def _of_peft(name: str) -> list[str]:
    from tests.parity.peft import check_models

    configs = [(scan, config) for case, scan, config in check_models.CASES if case == name]
    if not configs:
        return ["", "", ""]  # checked elsewhere
    found = [check_models.there_and_back(name, scan, config) for scan, config in configs]
    out, _, back, merged = np.max(np.asarray(found), 0)
    return [f"{x:.0e}" for x in (out, back, merged)]


def _word(is_so: bool) -> str:
    return "equal" if is_so else "**differ**"


def line(cells: Sequence[str]) -> str:
    """Return a row in Markdown."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    every = names()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *every], metavar="name")
    chosen = parser.parse_args().names or every
    with_peft = all(importlib.util.find_spec(x) for x in ("torch", "transformers", "peft"))
    if with_peft:
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
    for cells in (_HEAD, ["---"] * len(_HEAD)):
        print(line(cells))
    for name in chosen:
        print(line(row(name, with_peft=with_peft)), flush=True)


if __name__ == "__main__":
    main()
