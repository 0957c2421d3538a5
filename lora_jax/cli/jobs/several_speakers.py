"""Several adapters on one base, each of which can speak."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.errors import PromptError
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs import stacked
from lora_jax.cli.jobs.speaker import CLASSIFIER, Speaker, open_speaker
from lora_jax.cli.options import BASE
from lora_jax.models import stops
from lora_jax.models.text.tokenizer import Tokenizer


def open_with_stack(model: str, paths: Sequence[Path], *, fit: Fit, **options: Any) -> Speaker:
    """Return what speaks with any of several adapters, by their slots.

    Args:
      fit: how the adapters are fitted onto the model.
      options: of `open_speaker`.

    Raises:
      AdapterOptionError: an adapter changes the model, or the adapters do not fit together.
      LoraError: the model, a tokenizer or an adapter cannot be read.
    """
    speaker = open_speaker(model, None, scan=stacked.needs_scan(paths), fit=fit, **options)
    instead = "give it alone, as the only --adapter"
    overlays = [stacked.load_overlay(speaker.model, path, fit, instead) for path in paths]
    params = lora.join(speaker.params, stacked.stack_overlays(paths, overlays))
    return dataclasses.replace(speaker, params=params, apply=speaker.model.apply)


def open_speakers(
    model: str,
    named: Mapping[str, Path],
    *,
    encode: Callable[[Tokenizer], object],
    fit: Fit,
    stop: Sequence[str],
    **options: Any,
) -> dict[str, Speaker]:
    """Return what speaks with each of several adapters, and with none as `base`.

    They share the base's parameters, and a compilation.

    Args:
      named: the paths of adapters.
      encode: called with each tokenizer before the weights are read.
      fit: how the adapters are fitted onto the model.
      stop: texts that end an answer.
      options: of `open_speaker`.

    Raises:
      PromptError: the model cannot generate text.
      AdapterOptionError: as `open_with_stack`.
      LoraError: as `open_with_stack`.
    """
    if len(named) < 2:
        path = next(iter(named.values()), None)
        speaker = open_speaker(model, path, encode=encode, fit=fit, stop=stop, **options)
        plain = dataclasses.replace(speaker, params=lora.disable(speaker.params)) if named else None
        return {**dict.fromkeys(named, speaker), BASE: plain or speaker}
    base = sources.find_model(model)
    sources.require_kind(base, "encoder", "decoder")
    tokenizers = {name: sources.tokenizer_of(base, path) for name, path in named.items()}
    for name, path in named.items():
        if classifier := classifiers.find(base, path):
            raise PromptError(f"{classifier}: {CLASSIFIER}")
        encode(tokenizers[name])
    every = open_with_stack(model, [*named.values()], encode=encode, fit=fit, stop=stop, **options)
    found = {
        name: dataclasses.replace(
            every,
            slot=slot,
            tokenizer=tokenizer,
            ends=sources.stop_ids(base, tokenizer) | stops.special_ids(tokenizer, stop),
        )
        for slot, (name, tokenizer) in enumerate(tokenizers.items())
    }
    return {**found, BASE: dataclasses.replace(every, slot=-1)}
