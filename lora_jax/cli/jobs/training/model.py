"""The model that `lora-jax train --model` names, with its tokenizer."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lora_jax.cli import classifiers, sources
from lora_jax.cli.jobs.training.on_mesh import place
from lora_jax.cli.jobs.training.vocabulary import Vocabulary
from lora_jax.files import kinds
from lora_jax.files.naming import Naming
from lora_jax.models import published_classifier
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.pretrained import Apply, Pretrained
from lora_jax.models.text import Tokenizer
from lora_jax.models.weights.family import Family

_AS_IT_IS = Vocabulary()


@dataclass(frozen=True)
class TrainableModel:
    """A model as training sees it."""

    params: Any
    naming: Naming
    tokenizer: Tokenizer
    apply: Callable[[Any, Any, Any], Any] | None  # (params, ids, segments) -> logits; of decoders
    hidden: Callable[..., Any]  # (params, ids, segments or None) -> [rows, length, width]
    logits: Callable[[Any, Any], Any]  # (params, hidden states) -> [..., vocabulary]
    finish: Callable[[Any], Any]  # states @ head -> logits
    module: Any  # which these are functions of
    head_path: str  # of the leaf that turns hidden states into logits; "" where there is none
    head: Callable[[Any], Any]  # params -> that leaf as [width, vocabulary]
    family: Family
    settings: Mapping[str, Any]  # the content of its config.json
    config: Any  # of `Pretrained`
    pooler: Any  # the layer before a classifier's head, if the file has it
    width: int
    longest: int  # tokens per row
    vocabulary: int  # number of tokens that it has embeddings for
    stops: frozenset[int]  # ids at which generation ends
    loaded: Pretrained  # the model itself
    adapters: Any = None  # to start from: an overlay of `params`
    whole: tuple[str, ...] = ()  # leaves to train in full


def open_model(
    name: str,
    dtype: str | None,
    scan: bool,
    adapter: Path | None = None,
    now: datetime.datetime | None = None,
    say: Callable[[str], None] = lambda text: None,
    vocabulary: Vocabulary = _AS_IT_IS,
    mesh: Mesh | None = None,
    quantize: str | None = None,
) -> TrainableModel:
    """Load a model and its tokenizer.

    Args:
      name: a directory in Hugging Face's layout, a GGUF file, "smollm2" (downloaded and cached), or
        "tiny" (random, made here).
      dtype: of parameters and arithmetic; None for the file's.
      scan: whether layers are stacked.
      adapter: to start from, unless it is a classifier's; it may bring its own tokenizer, chat
        template or vocabulary.
      now: the time that a chat template sees; that of each call if None.
      say: called with a line before anything that takes long.
      vocabulary: tokens to add, and whether to untie the head.
      mesh: of devices, on which the parameters are sharded.
      quantize: as in `sources.load_model`.

    Raises:
      LoraError, OSError: the model does not exist or cannot be read.
    """
    found = sources.find_model(name, say)
    sources.require_kind(found, "encoder", "decoder")
    say(f"loading {name}")
    tokenizer = dataclasses.replace(sources.tokenizer_of(found, adapter), now=now)
    vocabulary.extend(tokenizer)
    stops = sources.stop_ids(found, tokenizer)
    is_changed = bool(vocabulary.tokens) or vocabulary.untie  # on the host, and placed then
    where = None if is_changed else mesh
    loaded = sources.load_model(found, dtype, scan=scan, mesh=where, quantize=quantize)
    loaded = place(vocabulary.apply(loaded, tokenizer), mesh)
    start = None if adapter is None else kinds.adapter(adapter)
    if start is None or classifiers.labels_of(start) is not None:
        return dataclasses.replace(
            to_trainable(loaded, tokenizer, stops), whole=vocabulary.whole(loaded)
        )
    adapted = sources.put_on(loaded, start)
    return dataclasses.replace(
        to_trainable(adapted.model, tokenizer, stops), adapters=adapted.adapters
    )


def to_trainable(
    found: Pretrained, tokenizer: Tokenizer, stops: frozenset[int] = frozenset()
) -> TrainableModel:
    """Return a loaded model as training sees it; `stops` end what it generates."""
    is_encoder = found.kind == "encoder"
    tied = isinstance(found.config, DecoderConfig) and found.config.tie_word_embeddings
    untied = "" if is_encoder else "head/kernel"
    return TrainableModel(
        params=found.params,
        naming=found.naming,
        tokenizer=tokenizer,
        **_functions(found.module, is_encoder),
        head_path="embedding/embedding" if tied else untied,
        head=lambda params: (
            params["embedding"]["embedding"].T if tied else params["head"]["kernel"]
        ),
        family=found.family,
        settings=found.settings,
        config=found.config,
        pooler=published_classifier.pooler_of(found),
        width=found.config.hidden_size,
        longest=found.longest,
        vocabulary=found.config.vocab_size,
        stops=stops,
        loaded=found,
    )


def with_remat(model: TrainableModel, remat: str) -> TrainableModel:
    """Return the model with layers that recompute what `remat` says; see `models.remat`."""
    config = dataclasses.replace(model.module.config, remat=remat)
    is_encoder = model.family.kind == "encoder"
    return dataclasses.replace(model, **_functions(model.module.clone(config=config), is_encoder))


def _functions(module: Any, is_encoder: bool) -> dict[str, Any]:
    """Return the fields of a `TrainableModel` that are functions of its module."""
    run = Apply(module)
    return {
        "module": module,
        "apply": None if is_encoder else run,
        "hidden": run if is_encoder else lambda *inputs: run(*inputs, method="hidden"),
        "logits": lambda params, states: run(params, states, method="logits"),
        "finish": (lambda products: products) if is_encoder else module.finish,
    }
