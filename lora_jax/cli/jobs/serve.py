"""What `lora-jax serve` does: load a base and adapters, and answer requests until a signal."""

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lora_jax as lora
from lora_jax.cli import classifiers, sources
from lora_jax.cli.adapter_names import named_adapters
from lora_jax.cli.errors import AdapterOptionError, PromptError
from lora_jax.cli.exit_status import INTERRUPTED
from lora_jax.cli.fit import Fit
from lora_jax.cli.jobs import stacked
from lora_jax.cli.jobs.speaker import CLASSIFIER, check_generates
from lora_jax.cli.parameters.serve_options import ServeOptions
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import escaped, shown
from lora_jax.core.signals import watched
from lora_jax.files import kinds
from lora_jax.models import Pretrained
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.serving.access import Access
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


def run(options: ServeOptions) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
      PromptError: the model generates no text, or has fewer positions than `--context`.
      AdapterOptionError: two adapters have one name, or do not fit together.
      AddressError: the address is in use.
      LoraError: the model, a tokenizer or an adapter cannot be read.
    """
    name = options.name or Path(options.model).name.removesuffix(".gguf")
    named = named_adapters(name, options.adapter or [])
    found = sources.find_model(options.model)
    served = _served(found, named)
    with contextlib.closing(listen(options.host, options.port)) as listener:  # before the long work
        scheduler, app = _made(options, found, served, list(named.values())[1:])
        _serve(Server(app, scheduler, listener), list(served), options.stop_after)


def _made(
    options: ServeOptions, found: kinds.Found, served: dict[str, Served], paths: Sequence[Path]
) -> tuple[Scheduler, Any]:
    """Load the model and its adapters, and return the scheduler and the application."""
    fit = Fit.of_options(options.strict, options.rename, options.residual)
    scan = stacked.needs_scan(paths)
    model = sources.load(found, None, options.dtype, quantize=options.quantize, scan=scan).model
    check_generates(model)
    rows = _rows(model, paths, fit, options)
    scheduler = Scheduler(rows, options.queue, idle=rows.programs() if options.warm_up else ())
    slots = range(len(paths), len(paths) + options.spare)
    catalogue = Catalogue(list(served.values()), slots)
    reader = Reader(catalogue.find, rows.context, model.config.vocab_size)

    def load(path: Path) -> Loaded:
        tokenizer, ends = _text_of(found, path)
        return Loaded(stacked.load_overlay(model, path, fit, _INSTEAD), tokenizer, ends)

    routes = Loading(scheduler, catalogue, load).routes() if options.spare else ()
    access = Access(options.api_key, options.allow_origin or ())
    return scheduler, make_app(scheduler, catalogue, reader, routes, access)


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


def _rows(model: Pretrained, paths: Sequence[Path], fit: Fit, options: ServeOptions) -> Rows:
    """Return empty rows of a model with these adapters."""
    context = _context(options.length, model.config.max_position_embeddings)
    if options.spare and not paths:
        raise AdapterOptionError(
            "--spare: give at least one --adapter too; those that are loaded later adapt the same "
            "weights"
        )
    overlays = [stacked.load_overlay(model, path, fit, _INSTEAD) for path in paths]
    stack = stacked.stack_overlays(paths, overlays) if paths else None
    if options.spare:
        empty = lora.select(stack, BASE)
        stack = lora.stack([*overlays, *[empty] * options.spare], rank=options.rank or None)
    rows = Rows(model, stack, options.rows, context)
    try:
        rows.check()
    except ConfigError as error:
        raise AdapterOptionError(
            f"--adapter: texts of one batch cannot have different adapters on this model: {error}; "
            f"to serve one adapter, {_INSTEAD}"
        ) from error
    return rows


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
