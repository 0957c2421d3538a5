"""What `lora-jax serve` does: load a base and adapters, and answer requests until a signal."""

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.adapter_names import named_adapters
from lora_jax.cli.errors import AdapterOptionError, PromptError
from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs import stacked
from lora_jax.cli.jobs.speaker import CLASSIFIER, check_generates
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.signals import watched
from lora_jax.files import kinds
from lora_jax.models import Pretrained
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.serving.app import make_app
from lora_jax.serving.asked import Reader
from lora_jax.serving.catalogue import Catalogue
from lora_jax.serving.loading import Loaded, Loading
from lora_jax.serving.rows import BASE, Rows
from lora_jax.serving.scheduler import Scheduler
from lora_jax.serving.served import Served
from lora_jax.serving.server import Server, listen

_INSTEAD = "merge it by 'lora-jax merge', and serve what that writes as --model"
_CONTEXT = 2048  # tokens by default, where the model has as many positions


@dataclass(frozen=True)
class Limits:
    """How much is served.

    Attributes:
      rows: requests that are answered at a time.
      context: maximum number of tokens of each; 0 for the default.
      queue: requests that may wait.
      stop_after: seconds that requests have to finish once the server is to stop.
      spare: adapters that can be loaded while it runs.
      rank: the largest rank of these; 0 for that of the first ones.
    """

    rows: int
    context: int
    queue: int
    stop_after: float
    spare: int
    rank: int


def run(
    model: str,
    adapters: Sequence[str],
    *,
    name: str | None,
    fit: Fit,
    dtype: str | None,
    quantize: str | None,
    address: tuple[str, int],
    limits: Limits,
    warm_up: bool,
) -> None:
    """Serve until Ctrl-C or SIGTERM; the arguments are the command's options.

    Raises:
      PromptError: the model generates no text, or has fewer positions than `context`.
      AdapterOptionError: two adapters have one name, or do not fit together.
      AddressError: the address is in use.
      LoraError: the model, a tokenizer or an adapter cannot be read.
    """
    named = named_adapters(name or Path(model).name.removesuffix(".gguf"), adapters)
    paths = list(named.values())[1:]
    found = sources.find_model(model)
    served = _served(found, named)
    with contextlib.closing(listen(*address)) as listener:  # before the work, which takes longer
        scan = stacked.needs_scan(paths)
        loaded = sources.load(found, None, dtype, quantize=quantize, scan=scan).model
        check_generates(loaded)
        rows = _rows(loaded, paths, fit, limits)
        scheduler = Scheduler(rows, limits.queue, idle=rows.programs() if warm_up else ())
        slots = range(len(paths), len(paths) + limits.spare)
        catalogue = Catalogue(list(served.values()), slots)
        reader = Reader(catalogue.find, rows.context, loaded.config.vocab_size)

        def load(path: Path) -> Loaded:
            tokenizer, ends = _text_of(found, path)
            return Loaded(stacked.load_overlay(loaded, path, fit, _INSTEAD), tokenizer, ends)

        routes = Loading(scheduler, catalogue, load).routes() if limits.spare else ()
        app = make_app(scheduler, catalogue, reader, routes)
        _serve(Server(app, scheduler, listener), list(served), limits.stop_after)


def _served(base: kinds.Found, named: dict[str, Path]) -> dict[str, Served]:
    """Return what is served by name; the weights are not read."""
    found = {}
    for slot, (name, path) in enumerate(named.items(), start=-1):
        adapter = None if slot < 0 else path
        found[name] = Served(name, *_text_of(base, adapter), slot)
    return found


def _text_of(base: kinds.Found, adapter: Path | None) -> tuple[Tokenizer, frozenset[int]]:
    """Return the tokenizer to use with an adapter, and the ids that end a text."""
    if classifier := classifiers.find(base, adapter):
        raise PromptError(f"{classifier}: {CLASSIFIER}")
    tokenizer = sources.tokenizer_of(base, adapter)
    return tokenizer, sources.stop_ids(base, tokenizer)


def _rows(model: Pretrained, paths: Sequence[Path], fit: Fit, limits: Limits) -> Rows:
    """Return empty rows of a model with these adapters."""
    context = _context(limits.context, model.config.max_position_embeddings)
    if limits.spare and not paths:
        raise AdapterOptionError(
            "--spare: give at least one --adapter too; those that are loaded later adapt the same "
            "weights"
        )
    overlays = [stacked.load_overlay(model, path, fit, _INSTEAD) for path in paths]
    stack = stacked.stack_overlays(paths, overlays) if paths else None
    if limits.spare:
        empty = lora.select(stack, BASE)
        stack = lora.stack([*overlays, *[empty] * limits.spare], rank=limits.rank or None)
    return Rows(model, stack, limits.rows, context)


def _context(wanted: int, positions: int) -> int:
    if wanted > positions:
        raise PromptError(
            f"--context {wanted}: the model has only {positions} positions; give at most that"
        )
    return wanted or min(_CONTEXT, positions)


def _serve(server: Server, names: Sequence[str], seconds: float) -> None:
    """Answer requests until a signal; a second one ends the process at once."""
    asked = threading.Event()

    def first() -> None:
        print("finishing the requests under way; Ctrl-C again stops at once", file=sys.stderr)
        asked.set()

    def second() -> NoReturn:
        print("error: interrupted at once", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    with watched(first, second):
        server.start()
        print(escaped(f"serving {', '.join(map(shown, names))} at {server.url}"), flush=True)
        server.wait(asked)
        server.stop(seconds)
