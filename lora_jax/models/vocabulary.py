"""Change the number of tokens of a model, and separate its output head from the embedding."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.files.naming import StoredLeaf
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.pretrained import Pretrained

#: How new rows start: the mean of the old ones, or their values `[new tokens, width]`.
Rows = Literal["mean"] | Any

_HEAD = ("head", "kernel")
_OF_BERTS_HEAD = re.compile(
    r"cls\.predictions\.(decoder\.)?(weight|bias)|lm_head\.(decoder\.)?(weight|bias)"
    r"|decoder\.(weight|bias)"
)


def resize_vocabulary(
    model: Pretrained, tokens: int, embedding: Rows = "mean", head: Rows = "mean"
) -> Pretrained:
    """Return a model with another number of tokens: rows are added at the end, or cut off there.

    Do it before `lora.init`, and train the new rows: with `LoraConfig(train=[...])` the whole
    embedding and head, which `peft.save` writes as PEFT does (in `modules_to_save`), or with
    `rows=` some of them.

    Args:
      model: without adapters. A quantized embedding or head becomes one of floats.
      tokens: the new number, such as `len(tokenizer)`.
      embedding: values of the new rows of the embedding, `[new, width]`; by default each is the
        mean of the old rows, so that new tokens begin neither likely nor unlikely.
      head: likewise for an output head that is not tied to the embedding.

    Raises:
      ConfigError: `tokens` is below 1, or values are given that do not fit.
      StructureError: `model.params` contains adapters.

    >>> from lora_jax.models.tiny import tiny
    >>> model = resize_vocabulary(tiny(11), 13)
    >>> model.params["embedding"]["embedding"].shape, model.settings["vocab_size"]
    ((13, 64), 13)
    """
    if tokens < 1:
        raise ConfigError(f"resize_vocabulary: tokens must be 1 or more, got {tokens}")
    path = model.family.embedding
    if not path:
        raise ConfigError(
            f"resize_vocabulary: {model.family.stem} has no embedding of tokens that can be resized"
        )
    resized = lambda rows, name: lambda x: _resize(x, tokens, rows, name)
    params = _replace(model.params, path, resized(embedding, "embedding"))
    is_untied = model.kind == "decoder" and "head" in params
    if is_untied:
        params = _replace(params, _HEAD, lambda x: resized(head, "head")(x.T).T)
    elif not isinstance(head, str):
        raise ConfigError("resize_vocabulary: head has values, but the model has no separate head")
    config = dataclasses.replace(model.config, vocab_size=tokens)
    return dataclasses.replace(
        model,
        config=config,
        module=type(model.module)(config),
        params=params,
        settings=_with_setting(model.settings, "vocab_size", tokens),
        rest={name: _rest(name, x, tokens) for name, x in model.rest.items()},
    )


def untie_head(model: Pretrained) -> Pretrained:
    """Return a model of the Llama family whose output head is a parameter apart from the embedding.

    It starts with the embedding's values, or codes, so the logits stay the same; `head/kernel` can
    then be adapted or trained without the embedding.

    Raises:
      ConfigError: the model has no head that is tied to its embedding.

    >>> from lora_jax.models.tiny import tiny
    >>> untie_head(tiny(11)).params["head"]["kernel"].shape
    (64, 11)
    """
    config = model.config
    if not isinstance(config, DecoderConfig) or not config.tie_word_embeddings:
        raise ConfigError("untie_head: the model has no output head that is tied to its embedding")
    config = dataclasses.replace(config, tie_word_embeddings=False)
    table = model.params["embedding"]["embedding"]
    if is_quantized(table):
        fields = {name: x.T.copy() for name, x in table.fields.items()}
        head = dataclasses.replace(table, fields=fields, axis=-3 - table.axis)
    else:
        head = _require_array(table, "embedding/embedding").T.copy()
    return dataclasses.replace(
        model,
        config=config,
        module=type(model.module)(config),
        params={**model.params, "head": {"kernel": head}},
        settings=_with_setting(model.settings, "tie_word_embeddings", False),
    )


def _with_setting(settings: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the settings with another value, which models with images have in `text_config`."""
    text = settings.get("text_config")
    if not isinstance(text, Mapping):
        return {**settings, key: value}
    own = {key: value} if key in settings or key == "tie_word_embeddings" else {}
    return {**settings, **own, "text_config": {**text, key: value}}


def _replace(tree: Any, path: tuple[str, ...], change: Callable[[Any], Any], at: int = 0) -> Any:
    """Return a tree in which the leaf at a path is changed."""
    if at == len(path):
        return change(_require_array(tree, "/".join(path)))
    return {**tree, path[at]: _replace(tree[path[at]], path, change, at + 1)}


def _require_array(leaf: Any, path: str) -> Any:
    if isinstance(leaf, StoredLeaf):
        return jnp.asarray(leaf)
    if is_quantized(leaf):
        return leaf.dequantize()
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise StructureError(
            f"{path}: is a {type(leaf).__name__}, but the vocabulary of a model is changed before "
            "adapters are added (merge or split them first)"
        )
    return leaf


def _resize(table: Any, tokens: int, rows: Rows, name: str) -> jax.Array:
    """Return `[tokens, width]` of a table `[old, width]`."""
    new = tokens - len(table)
    given = None if isinstance(rows, str) else jnp.asarray(rows)
    if isinstance(rows, str) and rows != "mean":
        raise ConfigError(f"resize_vocabulary: {name} must be 'mean' or values, got {rows!r}")
    if given is not None and given.shape != (max(new, 0), table.shape[1]):
        raise ConfigError(
            f"resize_vocabulary: the values of {name} have the shape {given.shape}, but "
            f"{max(new, 0)} new rows of width {table.shape[1]} are needed"
        )
    if new <= 0:
        return jnp.asarray(table[:tokens])
    if given is None:
        mean = jnp.asarray(table, jnp.float32).mean(0, keepdims=True)
        given = jnp.broadcast_to(mean, (new, table.shape[1]))
    return jnp.concatenate([jnp.asarray(table), given.astype(table.dtype)])


def _rest(name: str, tensor: Any, tokens: int) -> Any:
    """Return a tensor that is kept with the model: BERT's own head has a row per token too."""
    if not _OF_BERTS_HEAD.fullmatch(name):
        return tensor
    value = np.asarray(tensor)
    if value.ndim == 2:
        return np.asarray(_resize(value, tokens, "mean", name))
    return np.pad(value, (0, max(0, tokens - len(value))))[:tokens]
