"""Random decoders: what transformers computes, and what is computed and saved here."""

import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from lora_jax import models
from tests.stress.model_configs.decoder_fields import FAMILIES
from tests.stress.model_configs.decoder_files import STYLES, rewrite
from tests.stress.model_configs.draw import Draw
from tests.stress.model_configs.outcome import (
    TOLERANCE,
    Outcome,
    difference,
    file_difference,
    refusal,
)

_STEPS = 9
_DTYPES = ("float32", "float32", "bfloat16", "float16")
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def outcome(family: str, seed: str) -> Outcome:
    """Return what becomes of one random model."""
    draw = Draw(f"{family} {seed}")
    fields = FAMILIES[family](draw)
    style, dtype = draw.one_of(STYLES), draw.one_of(_DTYPES)
    shard = draw.one_of(["1GB", "1GB", "20KB"])
    about = {"family": family, "style": style, "dtype": dtype, "shard": shard, "fields": fields}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        there = Path(name) / "there"
        try:
            _write(there, family, fields, dtype, shard)
            rewrite(there, style, draw)
            oracle = _open(there)
            inputs = _inputs(draw, fields.get("text_config", fields))
            wanted = [_theirs(oracle, *x) for x in inputs]
        except Exception as error:  # whatever transformers says
            return Outcome("refused there", _line(error, there), about=about)
        found = _beside(oracle, there, inputs, wanted)
        about["config"] = (there / "config.json").read_text()
        return Outcome(found.sort, found.text, found.apart, about)


def _write(folder: Path, family: str, fields: dict[str, Any], dtype: str, shard: str) -> None:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**fields)
    if family == "gemma3":
        config._attn_implementation = "eager"
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, **_EAGER)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter += 0.2 * torch.randn_like(parameter)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _open(folder: Path) -> Any:
    kind: Any = transformers.AutoModelForCausalLM
    if '"gemma3"' in (folder / "config.json").read_text():
        kind = transformers.Gemma3ForConditionalGeneration
    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = [x for key in ("missing_keys", "mismatched_keys") for x in report[key]]
    if wrong:
        raise ValueError(f"transformers did not load {sorted(map(str, wrong))[:3]}")
    return model.eval()


def _inputs(draw: Draw, text: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and masks of several lengths, one up to the longest."""
    found = []
    arrays = np.random.default_rng(draw.random.getrandbits(32))
    longest = text["max_position_embeddings"]
    for length in (draw.one_of([3, 4, 11, 14]), longest):
        ids = arrays.integers(4, 61, (2, length)).astype(np.int32)
        mask = np.ones_like(ids)
        mask[1, : draw.random.randrange(3)] = 0  # on the left
        found.append((ids, mask))
    return found


def _theirs(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    places = np.maximum(mask.cumsum(-1) - 1, 0)
    tensors = [torch.from_numpy(np.asarray(x, np.int64)) for x in (ids, mask, places)]
    names = ("input_ids", "attention_mask", "position_ids")
    return model(**dict(zip(names, tensors, strict=True))).logits.float().numpy()


def _beside(oracle: Any, there: Path, inputs: Any, wanted: list[np.ndarray]) -> Outcome:
    scan = len(inputs[0][0][0]) % 2 > 0  # as random as the length
    try:
        model = models.load(there, "float32", scan=scan)
    except ValueError as error:
        return refusal(error, _fields(there))
    apply, longest = jax.jit(model.apply), inputs[-1][0].shape[1]
    apart = []
    for (ids, mask), logits in zip(inputs, wanted, strict=True):
        more = [(0, 0), (0, longest - ids.shape[1])]  # so that one program takes all lengths
        found = apply(model.params, np.pad(ids, more), np.pad(mask, more))
        apart.append(difference(np.asarray(found)[:, : ids.shape[1]][mask > 0], logits[mask > 0]))
    if not max(apart) <= TOLERANCE:
        lengths = [x[0].shape[1] for x in inputs]
        return Outcome("logits", f"{apart} at lengths {lengths}", max(apart))
    if not model.config.dense_layers:  # with them layers are never stacked
        other = models.load(there, "float32", scan=not scan)
        unlike = difference(jax.jit(other.apply)(other.params, inputs[0][0])[0], wanted[0][0])
        if not unlike <= TOLERANCE:
            return Outcome("scan", f"{unlike}", unlike)
    if (problem := _saved(oracle, there, inputs)) is not None:
        return problem
    if wanted[0].shape[1] in (3, 11) and (problem := _tokens(oracle, model, inputs)) is not None:
        return problem
    return Outcome("equal", apart=max(apart))


def _tokens(oracle: Any, model: models.Pretrained, inputs: Any) -> Outcome | None:
    """Compare greedy tokens, of a prompt that stays on one side of an original length."""
    ids = inputs[0][0][:1]
    rope = model.config.rope
    if model.config.sliding_window == 1:
        return None  # transformers' cache keeps all keys then
    if rope.kind == "longrope" and ids.shape[1] <= rope.original_max_position_embeddings:
        ids = inputs[1][0][:1, :14]  # transformers starts over when a text grows beyond it
    theirs = oracle.generate(
        torch.from_numpy(np.asarray(ids, np.int64)),
        attention_mask=torch.ones(ids.shape, dtype=torch.int64),
        max_new_tokens=_STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = theirs.sequences[0, ids.shape[1] :].numpy()
    cache = model.module.init_cache(1, ids.shape[1] + _STEPS)  # type: ignore[attr-defined]
    found = models.generate(model.apply, model.params, ids, cache, steps=_STEPS)
    different = np.flatnonzero(np.asarray(found)[0, : len(wanted)] != wanted)
    if not len(different):
        return None
    first = different[0]
    two = torch.topk(theirs.logits[first][0].float(), 2).values
    if float(two[0] - two[1]) < TOLERANCE * max(1.0, float(two[0].abs())):
        return None  # a tie
    return Outcome("tokens", f"{found[0].tolist()} for {wanted.tolist()}")


def _saved(oracle: Any, there: Path, inputs: Any) -> Outcome | None:
    again = there.parent / "again"
    models.save(again, models.load(there, as_stored=True))
    if (problem := file_difference(there, again)) is not None:
        return Outcome("saved", problem)
    back = _open(again)
    if any(not np.array_equal(_theirs(back, *x), _theirs(oracle, *x)) for x in inputs):
        return Outcome("saved", "transformers computes something else after saving")
    return None


def _line(error: BaseException, folder: Path) -> str:
    return f"{type(error).__name__}: {error}".replace(str(folder), "...").strip()


def _fields(folder: Path) -> set[str]:
    """Return the names of fields that a refusal may give."""
    return {"rope_type", *re.findall(r'"(\w+)":', (folder / "config.json").read_text())}
