"""Random encoders, models of images and of speech beside transformers."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lora_jax import models
from tests.stress.model_configs import images, speech, texts
from tests.stress.model_configs.case import Case
from tests.stress.model_configs.draw import Draw, shorten
from tests.stress.model_configs.outcome import (
    TOLERANCE,
    Outcome,
    difference,
    file_difference,
    refusal,
)

_AGAIN = 1e-6  # of the same values at other places in memory

#: Family -> what makes a random case of it.
FAMILIES: dict[str, Callable[[Draw], Case]] = {
    "bert": texts.bert,
    "roberta": texts.roberta,
    "xlm-roberta": texts.xlm_roberta,
    "modernbert": texts.modernbert,
    "vit": images.vit,
    "deit": images.deit,
    "siglip": images.siglip,
    "siglip_vision_model": images.siglip_vision,
    "clip": images.clip,
    "clip_vision_model": images.clip_vision,
    "whisper": speech.whisper,
}


def outcome(family: str, seed: str) -> Outcome:
    """Return what becomes of one random model, and which fields were not usual."""
    draw = Draw(f"{family} {seed}")
    try:
        found = _outcome(FAMILIES[family](draw))
    except Exception as error:  # any of ours is a problem, of transformers' a mistake in a table
        found = Outcome("raised", f"{type(error).__name__}: {error}")
    return Outcome(found.sort, found.text, found.apart, draw.changed)


def _outcome(case: Case) -> Outcome:
    """Return what becomes of a case, with layers stacked or not."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        there, again = Path(folder) / "there", Path(folder) / "again"
        case.model.eval().save_pretrained(there)
        config = there / "config.json"
        if case.draw.random.random() < 0.5:
            _shorten(config, case.draw)
        wanted = case.theirs(case.model, case.inputs)
        try:
            pretrained = models.load(there, scan=case.draw.random.random() < 0.5)
            found = case.ours(pretrained, case.inputs)
        except ValueError as error:
            return refusal(error, case.draw.changed)
        apart = max(difference(found[key], x) for key, x in wanted.items())
        if not apart <= TOLERANCE:
            return Outcome("differs", f"{apart:.1e}", apart)
        models.save(again, pretrained)
        if (problem := file_difference(there, again)) is not None:
            return Outcome("saved", problem)
        reloaded = type(case.model).from_pretrained(again, attn_implementation="eager").eval()
        after = case.theirs(reloaded, case.inputs)
        if any(difference(after[key], x) > _AGAIN for key, x in wanted.items()):
            return Outcome("reloaded", "transformers computes something else after saving")
        return Outcome("equal", apart=apart)


def _shorten(path: Path, draw: Draw) -> None:
    settings = json.loads(path.read_text())
    for part in (settings, settings.get("vision_config"), settings.get("text_config")):
        if part is not None:
            shorten(draw, part)
    path.write_text(json.dumps(settings))
