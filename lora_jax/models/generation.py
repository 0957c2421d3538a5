"""Text generation with a cache of keys and values."""

import dataclasses
from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.select import select
from lora_jax.adapters.stacks.stack import slots_of
from lora_jax.core.errors import ConfigError
from lora_jax.core.slots import check_ids
from lora_jax.engine.forms import Forms
from lora_jax.engine.transform import lora
from lora_jax.models.sampling import Sampling, sample_token


def advance(
    apply: Callable, params: Any, ids: jax.Array, segments: jax.Array, cache: Any, by_row: bool
) -> tuple[jax.Array, Any]:
    """Return the logits after the last token of each row, and the cache with the tokens in it.

    Args:
      apply, params, ids, segments, cache: as in `stream`, arrays all of them.
      by_row: whether the parameters have a stack of adapters, one for each row in their order.

    Returns:
      Logits `[batch, vocabulary]`, and the cache.
    """
    if by_row:
        forms = Forms.for_arrays((params, ids))
        if ids.shape[1] == 1:
            forms = dataclasses.replace(forms, share=False, rank_first=False)
        rows = np.arange(len(ids))  # known while tracing, so that nothing is gathered
        apply = lora(apply, forms=forms, adapters_of=rows, row_axes={"cache": cache.row_axes()})
    logits, cache = apply(params, ids, segments, cache=cache)
    return logits[:, -1], cache


_advance = partial(jax.jit, static_argnums=(0, 5), donate_argnames="cache")(advance)


# Measured: 64 rows of 64 adapters of rank 16, two CPU cores. One layer of 576 × 576: A[ids] and
# B[ids] at every step take 2.98 ms, the products with what was selected before 0.27 ms. A token of
# SmolLM2, q and v, over 64 rows of one adapter: 1.36, without `share` and `rank_first`, which copy
# the A of all rows, 1.16 (temporary memory 232 and 93 MB; what is left is scale · B).
_select = jax.jit(select)


def _check_rows(params: Any, slots: Any, rows: int) -> jax.Array:
    """Return the slot of each row, or raise unless there is one for each."""
    ids = check_ids("adapters_of", slots, slots_of("adapters_of", params))
    if ids.shape != (rows,):
        raise ConfigError(
            f"adapters_of: pass one slot per row of ids, {rows} of them, got shape {ids.shape}"
        )
    return ids


def _of_rows(params: Any, slots: jax.Array | None) -> Any:
    """Return the parameters with the adapter of each row; as they are without `slots`."""
    if slots is None:
        return params
    base, stack = split(params)
    return join(base, _select(stack, slots))


def stream(
    apply: Callable,
    params: Any,
    ids: Any,
    cache: Any,
    *,
    steps: int,
    segments: Any = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop: Collection[int] | Sequence[Collection[int]] = (),
    adapters_of: Any = None,
) -> Generator[np.ndarray, Any, None]:
    """Generate tokens that continue each row, one step at a time.

    The model is compiled twice, for the prompt and for a single token, and again only for another
    prompt length or cache size. Other parameters can take over while it runs: `send(params)` on
    what this returns is `next`, with these parameters from then on.

    Args:
      apply: `apply(params, ids, segments, cache=cache) -> (logits, cache)`: `pretrained.apply`,
        or `lora(pretrained.apply)` for parameters with adapters. Reuse it: a new function is
        compiled again.
      params: the model's parameters.
      ids: prompts, integers `[batch, length]`. Pad shorter ones on the left (`left_pad`).
      cache: `module.init_cache(batch, ...)` for at least `length + steps` tokens; it is donated.
      steps: maximum number of tokens.
      segments: integers `[batch, length]`, 0 at padding; ones by default.
      temperature, top_k, top_p: as in `Sampling`; greedy by default.
      key: PRNG key, needed if `temperature` is above 0.
      stop: tokens that end a row (`models.stops.stop_ids` finds a model's); or one collection of
        tokens per row.
      adapters_of: for parameters with a stack of adapters, `join(base, stack([...]))`: the slot of
        each row, integers `[batch]`; -1 is the plain base. `apply` may then be the model's own.
        The adapters of the rows are selected once, which takes the memory of one adapter per row.
        Neither other slots nor other adapters in a slot (`set_slot`) compile anything again.

    Yields:
      int32 `[batch]`, at most `steps` times, until every row has produced a `stop` token. A row
      that has ended repeats that token.

    Raises:
      ValueError: the cache is too short, `Sampling` refuses a value, the key is missing, or `stop`
        has another number of rows.
      ConfigError: `adapters_of` has another number of rows, or names no slot.
      StructureError: there is `adapters_of`, but no stack in the parameters.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if sampling.temperature > 0 and key is None:
        raise ValueError("sampling with a temperature above 0 needs key=")
    ids = jnp.asarray(ids, jnp.int32)
    needed, room = ids.shape[1] + steps, cache.length - int(cache.filled)
    if needed > room:
        raise ValueError(
            f"{ids.shape[1]} tokens and {steps} steps do not fit into a cache with {room} free "
            "slots; make a longer one with init_cache"
        )
    segments = jnp.ones_like(ids) if segments is None else jnp.asarray(segments, jnp.int32)
    ends = _per_row(stop, len(ids))
    slots = None if adapters_of is None else _check_rows(params, adapters_of, len(ids))
    return _stream(apply, params, slots, ids, segments, cache, steps, sampling, key, ends)


def _per_row(stop: Collection[int] | Sequence[Collection[int]], rows: int) -> list[Collection[int]]:
    """Return the tokens that end each row."""
    given: list[Any] = list(stop)
    if all(isinstance(x, int | np.integer) for x in given):
        return [given] * rows
    if len(given) != rows:
        raise ValueError(f"stop has tokens for {len(given)} rows, but there are {rows}")
    return given


def _stream(
    apply: Callable,
    params: Any,
    slots: jax.Array | None,
    ids: jax.Array,
    segments: jax.Array,
    cache: Any,
    steps: int,
    sampling: Sampling,
    key: jax.Array | None,
    stop: list[Collection[int]],
) -> Generator[np.ndarray, Any, None]:
    key = jax.random.key(0) if key is None else key  # greedy decoding does not use it
    ended = np.zeros(len(ids), bool)
    tokens = np.zeros(len(ids), np.int32)
    params = _of_rows(params, slots)
    for step in range(steps):
        logits, cache = _advance(apply, params, ids, segments, cache, slots is not None)
        chosen = np.asarray(sample_token(logits, jax.random.fold_in(key, step), sampling))
        tokens = np.where(ended, tokens, chosen)
        ended |= [int(token) in ends for token, ends in zip(tokens, stop, strict=True)]
        sent = yield tokens
        if sent is not None:
            rows = None if slots is None else _check_rows(sent, slots, len(ids))
            params = _of_rows(sent, rows)
        if ended.all():
            return
        ids = jnp.asarray(tokens)[:, None]
        segments = jnp.ones_like(ids)


def generate(apply: Callable, params: Any, ids: Any, cache: Any, **options: Any) -> np.ndarray:
    """Return what `stream` yields with these arguments, as int32 `[batch, at most steps]`."""
    return np.stack(list(stream(apply, params, ids, cache, **options)), axis=1)


def left_pad(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts of different lengths on the left into one array.

    Returns:
      Ids and segments for `stream`, int32 `[batch, length of the longest]`.

    >>> ids, segments = left_pad([[5, 6, 7], [8]])
    >>> ids.tolist(), segments.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        segments[i, length - len(row) :] = 1
    return ids, segments
