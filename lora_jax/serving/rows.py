"""`Rows`: a fixed number of texts that continue together, each with its own adapter."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.split import join
from lora_jax.adapters.stacks.select import select, set_slot
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.engine.transform import lora
from lora_jax.models.cache import Cache
from lora_jax.models.generation import advance
from lora_jax.models.pretrained import Pretrained
from lora_jax.serving.choosing import Choosing, Controls, bias_of, controls
from lora_jax.serving.columns import at_least, insert, move, sizes, widen
from lora_jax.serving.marks import Marks, mark_made, mark_prompts, mark_row, no_marks
from lora_jax.serving.row_sampling import choose, log_probabilities

SHORTEST = (32, 256)  # tokens to which prompts and the cache are padded at least
_FREE = 8  # part of the shortest cache that is free after a move, where the longest has it
BASE = -1  # the slot of the plain base


@dataclass(frozen=True)
class Sampled:
    """A token, and what the model thought of it.

    Attributes:
      token: its id.
      logprob: its log-probability, at temperature 1.
      top: the ids of the likeliest tokens and their log-probabilities, if the row asked for them.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Rows:
    """Texts that continue together on one base, with one cache.

    A row's tokens are those that `models.generate` returns for it alone. Rows join and leave
    between steps, and nothing is compiled for that: prompts are padded to a few lengths, and the
    cache has one of a few lengths, the shortest that is long enough.

    Args:
      model: the base.
      stack: adapters on it, `lora.stack([...])`; None to serve the base alone.
      count: number of rows.
      context: maximum number of tokens per row, prompt and continuation together.
      shortest: the shortest lengths of padded prompts and of the cache; each further one is twice
        as long, up to `context`.

    Attributes:
      compilations: how many programs were compiled so far.
    """

    def __init__(
        self,
        model: Pretrained,
        stack: Any,
        count: int,
        context: int,
        shortest: tuple[int, int] = SHORTEST,
    ) -> None:
        self.model, self.count, self.context = model, count, context
        self.compilations, self._vocabulary = 0, model.config.vocab_size
        self._base, self._stack, self._by_row = model.params, stack, stack is not None
        quantized = any(map(is_quantized, jax.tree.leaves(model.params, is_leaf=is_quantized)))
        self._apply = lora(model.apply) if quantized and not self._by_row else model.apply
        self._prompt_lengths = sizes(shortest[0], context)
        self._cache_lengths = sizes(shortest[1], context)
        self._margin = shortest[1] // _FREE
        self._prefill = self._compiled(self._prefill_one)
        self._step = self._compiled(self._step_all, donate_argnums=1)
        self._insert = self._compiled(_insert, donate_argnums=(0, 1))
        self._move = self._compiled(move, static_argnums=2)
        self._select = self._compiled(select)
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        self._cache: Cache | None = None
        self._marks = no_marks(self.count, self._vocabulary)
        self._filled = 0  # columns of the cache that are in use
        self._first: dict[int, int] = {}  # the first column of each row that is in use
        self._slots = np.full(self.count, BASE, np.int32)
        self._params: Any = None  # with the adapters of the rows; made when they are needed
        self._tokens = np.zeros(self.count, np.int32)
        self._steps = np.zeros(self.count, np.int32)
        self._choosing = [Choosing()] * self.count
        key = jax.random.key_data(jax.random.key(0))
        self._keys = np.tile(np.asarray(key), (self.count, 1))

    def warm_up(self) -> None:
        """Compile all that requests can need, so that none has to wait for it."""
        for compile_next in self.programs():
            compile_next()

    def programs(self) -> list[Callable[[], None]]:
        """Return functions that compile all that requests can need, the commonest first.

        They empty the rows, so no row may be in use when one of them is called.
        """
        lengths = self._cache_lengths
        pairs = [(length, other) for length in lengths for other in lengths]
        ways = [functools.partial(self._compile_way, *pair) for pair in pairs]
        prompts = [functools.partial(self._compile_prompt, x) for x in self._prompt_lengths]
        steps = [functools.partial(self._compile_step, length) for length in lengths]
        return [ways[0], steps[0], *prompts, *ways[1:], *steps[1:]]

    def _compile_prompt(self, length: int) -> None:
        self.clear()
        self.join(0, [0] * min(length, self.context - 1), BASE, Choosing())
        self.clear()

    def _compile_way(self, length: int, other: int) -> None:
        """Compile how columns get from a cache of some length to another one."""
        if other <= length:
            begun = self._new_cache(1, other), no_marks(1, self._vocabulary)
            self._insert(self._empty(length, 1), self._marks, *begun, np.int32(0))
            self.clear()
        self._move(self._empty(length, 1), np.int32(0), other)

    def _compile_step(self, length: int) -> None:
        self._cache, self._filled, self._first = self._empty(length, 1), 1, {0: 0}
        self.step()
        self.clear()

    @property
    def free(self) -> list[int]:
        """The rows that are not in use."""
        return [row for row in range(self.count) if row not in self._first]

    @property
    def lost(self) -> bool:
        """Whether the cache was given to a program that failed; only `clear` helps then."""
        return any(x.is_deleted() for x in jax.tree.leaves((self._cache, self._marks)))

    def set_adapter(self, slot: int, overlay: Any) -> None:
        """Put an adapter into a slot of the stack.

        Raises:
          StructureError: it does not fit the stack.
        """
        self._stack, self._params = set_slot(self._stack, slot, overlay), None

    def join(self, row: int, ids: list[int], slot: int, choosing: Choosing) -> Sampled:
        """Let a text begin in a free row, and return the first token that follows it.

        Args:
          row: one of `free`.
          ids: the prompt, at least one and fewer than `context` tokens.
          slot: of its adapter in the stack; `BASE` for the plain base.
          choosing: how the tokens are chosen.
        """
        count = len(ids)
        padded = np.zeros((2, 1, at_least(self._prompt_lengths, count)), np.int32)
        padded[0, 0, -count:], padded[1, 0, -count:] = ids, 1
        params = self._of_slots(np.array([slot], np.int32))
        key = np.asarray(jax.random.key_data(jax.random.key(choosing.seed)))
        bias, numbers = bias_of(choosing, self._vocabulary), controls([choosing], self._vocabulary)
        sampled, *begun = self._prefill(params, padded, key[None], bias, numbers)
        (found,) = _read(sampled, [choosing])
        self._make_room(count)
        self._cache, self._marks = self._insert(self._cache, self._marks, *begun, np.int32(row))
        self._first[row] = self._filled - count
        if self._slots[row] != slot:
            self._slots[row], self._params = slot, None
        self._tokens[row], self._steps[row] = found.token, 1
        self._choosing[row], self._keys[row] = choosing, key
        return found

    def leave(self, row: int) -> None:
        """Free a row."""
        self._first.pop(row, None)
        self._choosing[row] = Choosing()

    def check(self) -> None:
        """Raise what the model raises where each row has its own adapter; nothing is computed.

        Raises:
          ConfigError: the model mixes the rows of a batch.
        """
        self._step.eval_shape(*self._of_step())  # type: ignore[attr-defined]
        self.clear()

    def step(self) -> dict[int, Sampled]:
        """Return the next token of each row that is in use."""
        sampled, self._cache, self._marks = self._step(*self._of_step())
        self._filled += 1
        found = _read(sampled, self._choosing)
        for row in self._first:
            self._tokens[row] = found[row].token
            self._steps[row] += 1
        return {row: found[row] for row in self._first}

    def _of_step(self) -> tuple[Any, ...]:
        """Return the arguments of the next step."""
        self._make_room(0)
        if self._params is None:
            self._params = self._of_slots(self._slots)
        used = np.array([row in self._first for row in range(self.count)], np.int32)
        state, numbers = (self._cache, self._marks), controls(self._choosing, self._vocabulary)
        return self._params, state, self._tokens, used, self._keys, self._steps, numbers

    def _make_room(self, count: int) -> None:
        """Have `count` columns in use or more, at least one free one, and a cache of that length.

        Texts begin at different columns, so those before the first one of all can go.
        """
        if not self._first:  # nothing to keep
            self._filled = count
            self._cache = None  # let its memory go first
            self._cache = self._empty(at_least(self._cache_lengths, count + self._margin), count)
            return
        assert self._cache is not None
        if count <= self._filled < self._cache.length:
            return
        oldest = min(self._first.values())
        filled = max(self._filled - oldest, count)
        offset = self._filled - filled
        length = at_least(self._cache_lengths, filled + self._margin)
        self._cache = self._move(self._cache, np.int32(offset), length)
        self._filled = filled
        self._first = {row: first - offset for row, first in self._first.items()}

    def _empty(self, length: int, filled: int) -> Cache:
        """Return a cache with empty columns, some of them in use."""
        cache = self._new_cache(self.count, length)
        return dataclasses.replace(cache, filled=jnp.int32(filled))

    def _new_cache(self, count: int, length: int) -> Cache:
        return self.model.module.init_cache(count, length, reach=self.context)

    def _of_slots(self, slots: np.ndarray) -> Any:
        if self._stack is None:
            return self._base
        return join(self._base, self._select(self._stack, slots))

    def _compiled(self, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.compilations += 1
            return fn(*args)

        return jax.jit(counted, **options)

    def _prefill_one(
        self, params: Any, padded: jax.Array, keys: jax.Array, bias: Any, numbers: Controls
    ) -> Any:
        """Return the first token after a prompt, `[ids and segments, 1, length]`; its cache."""
        ids, segments = padded
        cache = self._new_cache(1, ids.shape[1])
        logits, cache = advance(self._apply, params, ids, segments, cache, self._by_row)
        cache = widen(cache, at_least(self._cache_lengths, ids.shape[1]))
        marks = mark_prompts(ids, segments, bias, self._vocabulary)
        sampled, marks = _sample(logits, keys, jnp.zeros(1, jnp.int32), marks, numbers)
        return sampled, cache, marks

    def _step_all(
        self,
        params: Any,
        state: tuple[Cache, Marks],
        tokens: jax.Array,
        used: jax.Array,
        keys: jax.Array,
        steps: jax.Array,
        numbers: Controls,
    ) -> Any:
        """Return the next token of each row, and the cache with the tokens before them."""
        cache, marks = state
        ids, segments = tokens[:, None], used[:, None]
        logits, cache = advance(self._apply, params, ids, segments, cache, self._by_row)
        sampled, marks = _sample(logits, keys, steps, marks, numbers)
        return sampled, cache, marks


def _insert(cache: Cache, marks: Marks, prompt: Cache, begun: Marks, row: jax.Array) -> Any:
    """Return the cache and the marks of all rows with those of a prompt in one of them."""
    return insert(cache, prompt, row), mark_row(marks, begun, row)


def _sample(
    logits: jax.Array, keys: jax.Array, steps: jax.Array, marks: Marks, numbers: Controls
) -> tuple[tuple[jax.Array, ...], Marks]:
    """Return tokens, as `choose` does, and their log-probabilities; the marks after them."""
    tokens = choose(logits, jax.random.wrap_key_data(keys), steps, marks, numbers)
    told = log_probabilities(logits, tokens, numbers.top)
    return (tokens, *told), mark_made(marks, tokens)


def _read(sampled: Any, choosing: list[Choosing]) -> list[Sampled]:
    """Return what a compiled function returned for rows, on the host."""
    tokens, own, values, ids = map(np.asarray, sampled)
    return [
        Sampled(
            int(tokens[i]),
            float(own[i]),
            list(zip(ids[i, : x.top].tolist(), values[i, : x.top].tolist(), strict=True)),
        )
        for i, x in enumerate(choosing)
    ]
