"""Rows that join and leave at any step continue as each does alone."""

import dataclasses

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.pretrained import Pretrained
from lora_jax.serving.choosing import Choosing
from lora_jax.serving.rows import Rows
from tests.models import recorded
from tests.serving import small

pytestmark = pytest.mark.usefixtures("quick_compile")


@dataclasses.dataclass(frozen=True)
class Text:
    ids: list[int]
    slot: int
    steps: int
    choosing: Choosing

    def alone(self):
        c = self.choosing
        sampling = c.temperature, c.top_p, c.seed, c.top_k
        return small.alone(self.ids, self.slot, self.steps, *sampling)


def texts(count, seed=0, longest=small.PADDED):
    """Random prompts, adapters and samplings; some texts fill the context."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        ids = rng.integers(0, 256, int(rng.integers(1, longest + 1))).tolist()
        most = small.CONTEXT - len(ids)
        steps = most if number % 5 == 4 else int(rng.integers(1, 20))
        choosing = Choosing(
            *((0, 1), (1.3, 0.9))[int(rng.integers(2))],
            seed=int(rng.integers(-5, 1000)),
            top=int(rng.integers(0, 4)),
            top_k=(0, 7)[number % 2],
        )
        yield Text(ids, int(rng.integers(-1, 2)), min(steps, most), choosing)


def continue_all(rows, given):
    """Let each text join as soon as a row is free, and return their tokens."""
    waiting, running = list(enumerate(given)), {}
    found = [[] for _ in given]
    while waiting or running:
        while waiting and rows.free:
            number, text = waiting.pop(0)
            row = rows.free[0]
            found[number].append(rows.join(row, text.ids, text.slot, text.choosing))
            running[row] = number
            if text.steps == 1:
                rows.leave(row)
                del running[row]
        for row, token in rows.step().items() if running else ():
            number = running[row]
            found[number].append(token)
            if len(found[number]) == given[number].steps:
                rows.leave(row)
                del running[row]
    return found


def test_rows_continue_as_each_does_alone():
    rows = small.rows()
    rows.clear()
    given = list(texts(12))
    found = continue_all(rows, given)
    tokens = [[x.token for x in one] for one in found]
    assert tokens == [text.alone() for text in given]
    assert len({text.choosing.temperature for text in given}) == 2
    again = continue_all(rows, given[::-1])  # beside other texts, at other columns
    assert [[x.token for x in one] for one in again[::-1]] == tokens
    # Two selections, two lengths of prompts, two of the cache, and the ways between them.
    assert rows.compilations <= 2 + 2 + 2 + 3 + 4
    for text, one in zip(given, found, strict=True):
        assert [len(x.top) for x in one] == [text.choosing.top] * text.steps
        for token in one:
            assert token.logprob <= 0
            if token.top and not text.choosing.temperature:
                assert token.top[0] == (token.token, pytest.approx(token.logprob, abs=1e-5))


MIXED = (
    Choosing(repetition=1.7),
    Choosing(presence=1.5, frequency=-0.6),
    Choosing(bias=((65, 9.0), (7, -100.0)), frequency=2.0),
    Choosing(),
    Choosing(temperature=0.8, seed=3, repetition=0.7, min_p=0.05),
    Choosing(temperature=1.5, seed=4, top_k=40, top_p=0.8, presence=-2.0, bias=((1, 5.0),)),
    Choosing(temperature=1.0, seed=-4, min_p=0.3),
)


def test_each_row_has_its_own_penalties():
    """Beside numpy on the logits of the whole text, and without a compilation for any mix."""
    rows = small.rows()
    rows.clear()
    rows.warm_up()
    compiled, rng = rows.compilations, np.random.default_rng(2)
    given = [
        Text(rng.integers(0, 99, 3 + 4 * n).tolist(), n % 3 - 1, 12 + n, choosing)
        for n, choosing in enumerate(MIXED)
    ]
    for text, found in zip(given, continue_all(rows, given), strict=True):
        made = [x.token for x in found]
        logits = small.logits_after(text.ids + made, text.slot)[len(text.ids) - 1 :]
        told = [made[:n] for n in range(text.steps)]
        wanted = [
            small.next_token(logits[n], text.ids, before, n, text.choosing)
            for n, before in enumerate(told)
        ]
        assert made == wanted, text.choosing
        # What is told of the tokens are the model's own probabilities.
        own = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        for n, x in enumerate(found):
            assert x.logprob == pytest.approx(own[n, x.token], abs=1e-4)
    assert rows.compilations == compiled


class MixesRows(Pretrained):
    @property
    def apply(self):
        def apply(params, ids, segments=None, **options):
            logits, cache = small.model().apply(params, ids, segments, **options)
            return logits - logits.mean(0, keepdims=True), cache

        return apply


def test_a_model_that_mixes_rows_is_refused_before_the_first_request():
    fields = {x.name: getattr(small.model(), x.name) for x in dataclasses.fields(Pretrained)}
    mixes = MixesRows(**fields)
    with pytest.raises(lora.ConfigError, match="mixes the rows of the batch"):
        Rows(mixes, small.stack(), 2, small.CONTEXT, shortest=(32, 32)).check()
    rows = small.rows()
    rows.clear()
    rows.check()
    assert rows.free == [0, 1, 2]


FAMILIES = [
    *(pytest.param(name, {}, id=name) for name in (*recorded.CAUSAL, *recorded.NEWER)),
    pytest.param("llama", {"scan": True}, id="scanned"),
    pytest.param("qwen2", {"quantize": "int8"}, id="quantized"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", FAMILIES)
def test_every_family_in_rows(name, options):
    """Windows, caps and norms of a family, and texts that outgrow the cache, on the plain base."""
    model = recorded.load(name, **options)
    context = min(64, model.config.max_position_embeddings)
    rows = Rows(model, None, 2, context, shortest=(8, 16))
    apply = lora.lora(model.apply) if "quantize" in options else model.apply
    for number, text in enumerate(texts(6, seed=1, longest=8)):
        ids = [x % model.config.vocab_size for x in text.ids]
        steps = min(context - len(ids), 40 if number % 2 else 9)
        given = [dataclasses.replace(text, ids=ids, slot=-1, steps=steps)] * 2
        found = continue_all(rows, given)
        cache = model.module.init_cache(1, context)
        names = ("temperature", "top_k", "top_p")
        options_of = {name: getattr(text.choosing, name) for name in names}
        key = jax.random.key(text.choosing.seed)
        wanted = models.generate(
            apply, model.params, np.array([ids]), cache, steps=steps, key=key, **options_of
        )
        assert [[x.token for x in one] for one in found] == [wanted[0].tolist()] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("mixtral", {"scan": True}), ("gpt_oss", {})])
def test_rows_with_different_adapters_on_experts(name, options):
    """In one step, each as alone with its own adapter merged."""
    model, rng = recorded.load(name, **options), np.random.default_rng(0)
    config = lora.LoraConfig(rank=2, alpha=8, targets=["query", "experts"])
    made = lora.init(jax.random.key(0), model.params, config, model.apply, np.ones((1, 4), int))
    noisy = lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f") if x.ndim > 1 else x
    overlays = [jax.tree.map(noisy, lora.split(made)[1]) for _ in range(2)]
    rows = Rows(model, lora.stack(overlays), 3, 32, shortest=(8, 32))
    ids, slots = [[3, 1, 4], [1, 5], [9, 2, 6, 5]], [1, -1, 0]
    given = [Text(x, slot, 9, Choosing(0, 1)) for x, slot in zip(ids, slots, strict=True)]
    for text, tokens in zip(given, continue_all(rows, given), strict=True):
        params = model.params
        if text.slot >= 0:
            params = lora.merge(lora.join(params, overlays[text.slot]))
        cache = model.module.init_cache(1, 32)
        wanted = models.generate(model.apply, params, np.array([text.ids]), cache, steps=9)
        assert [x.token for x in tokens] == wanted[0].tolist()
