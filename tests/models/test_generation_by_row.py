"""Rows with adapters of their own continue as each does alone, on the merged model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from tests.models.recorded import load

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5, 8, 9]]
IDS, SEGMENTS = models.left_pad(PROMPTS)
SLOTS = [1, 0, -1, 2]
STEPS = 5
KINDS = (
    {"rank": 2, "targets": ["query", "value", "mlp"]},
    {"rank": 5, "targets": ["attention"], "scaling": "rslora", "train": ["attention_norm"]},
    {"rank": 3, "targets": ["query", "output"], "dora": True},
)


@functools.cache
def adapters(name, **options):
    """Return overlays whose effect is large enough to change most tokens."""
    model = load(name, **options)
    rng = np.random.default_rng(0)
    made = []
    fused = {"query": "query_key_value", "value": "query_key_value"} if name == "phi3" else {}
    for kind in KINDS:
        kind = kind | {"targets": sorted({fused.get(x, x) for x in kind["targets"]})}
        params = lora.init(
            jax.random.key(0), model.params, lora.LoraConfig(alpha=8, **kind), model.apply, IDS
        )
        made.append(jax.tree.map(functools.partial(noisy, rng), lora.split(params)[1]))
    return made


def noisy(rng, x):
    """Return factors plus noise; scales and the like as they are."""
    return x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) if x.ndim > 1 else x


@functools.cache
def counted(name, **options):
    """Return a model's function, and a list with an entry for each time that it was traced."""
    model, traced = load(name, **options), []

    def apply(*args, **more):
        traced.append(args)
        return model.apply(*args, **more)

    return apply, traced


def continued(model, params, apply=None, rows=slice(None), **options):
    """Return what these rows of the prompts continue with."""
    ids, segments = IDS[rows], SEGMENTS[rows]
    cache = model.module.init_cache(len(ids), ids.shape[1] + STEPS)
    return models.generate(
        apply or model.apply, params, ids, cache, steps=STEPS, segments=segments, **options
    )


def one_by_one(model, params_of_rows):
    """Return what each prompt continues with alone, with these parameters."""
    return [
        continued(model, params, rows=slice(i, i + 1))[0] for i, params in enumerate(params_of_rows)
    ]


def with_adapter(base, overlays, slot):
    return base if slot < 0 else lora.merge(lora.join(base, overlays[slot]))


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("mistral", {}, marks=pytest.mark.slow),  # its window of 4 is exceeded
        pytest.param("llama_tied", {"scan": True}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"scan": True}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", {"scan": True}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", {"scan": True, "quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param("phi3", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"scan": True, "quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"scan": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"scan": True, "quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"scan": True}, marks=pytest.mark.slow),
    ],
)
def test_each_row_continues_as_it_does_alone(name, options):
    model, overlays = load(name, **options), adapters(name, **options)
    params = lora.join(model.params, lora.stack(overlays))
    found = continued(model, params, counted(name, **options)[0], adapters_of=SLOTS)
    base = lora.dequantize(model.params) if "quantize" in options else model.params
    wanted = one_by_one(model, [with_adapter(base, overlays, slot) for slot in SLOTS])
    np.testing.assert_array_equal(found, wanted)
    plain = one_by_one(model, [base] * 4)
    moved = (found != np.stack(plain)).any(1).tolist()
    assert moved[1] and moved[3] and not moved[2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_bfloat16_rows_are_as_far_from_float32_as_each_alone():
    model, overlays = load("llama", dtype="bfloat16"), adapters("llama", dtype="bfloat16")
    exact = load("llama")
    stacked = lora.join(model.params, lora.stack(overlays))
    mixed = lora.lora(model.apply, adapters_of=np.array(SLOTS))(stacked, IDS, SEGMENTS)
    for row, slot in enumerate(SLOTS):
        one = slice(row, row + 1)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), overlays[max(slot, 0)])
        params = with_adapter(exact.params, [wide] * 3, slot)
        wanted = exact.apply(params, IDS[one], SEGMENTS[one])
        own = lora.join(model.params, overlays[slot]) if slot >= 0 else model.params
        alone = lora.lora(model.apply)(own, IDS[one], SEGMENTS[one])
        seen = SEGMENTS[row] > 0
        far, of_alone = (
            np.abs(np.asarray(x, "f")[0] - wanted[0])[seen].max() for x in (mixed[one], alone)
        )
        assert far <= 1.5 * of_alone


@pytest.mark.usefixtures("quick_compile")
def test_a_slot_is_replaced_while_other_rows_go_on():
    """Nothing is compiled again for other slots, for another adapter in one, or for the base."""
    model, overlays = load("mistral"), adapters("mistral")
    apply, traced = counted("mistral")
    stack = lora.stack(overlays)
    params = lora.join(model.params, stack)
    changed = lora.join(model.params, lora.set_slot(stack, 1, overlays[0]))

    def stream(slots):
        cache = model.module.init_cache(4, IDS.shape[1] + STEPS)
        options = {"steps": STEPS, "segments": SEGMENTS, "adapters_of": slots}
        return models.stream(apply, params, IDS, cache, **options)

    undisturbed = np.stack(list(stream(SLOTS)))
    compiled = len(traced)
    running = stream(jnp.array(SLOTS))
    found = [next(running), next(running), running.send(changed), *running]
    np.testing.assert_array_equal(np.stack(found)[:, 1:], undisturbed[:, 1:])
    np.testing.assert_array_equal(found[:2], undisturbed[:2])
    assert (np.stack(found)[2:, 0] != undisturbed[2:, 0]).any()
    np.testing.assert_array_equal(
        np.stack(list(stream([-1] * 4)), 1), continued(model, model.params)
    )
    assert len(traced) == compiled


def small(scan):
    """Return a model whose cache is larger than anything else in a step."""
    config = DecoderConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        scan=scan,
    )
    model = Decoder(config)
    params = model.init(jax.random.key(0), IDS[:1])
    config = lora.LoraConfig(rank=2, alpha=8, targets=["query", "down"])
    made = lora.init(jax.random.key(1), params, config, model.apply, IDS[:1])
    add = functools.partial(noisy, np.random.default_rng(0))
    return model, params, [jax.tree.map(add, lora.split(made)[1]) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_a_step_updates_the_cache_in_place_and_gives_the_logits_of_each_row(scan):
    model, params, overlays = small(scan)
    cache = model.init_cache(4, 2048)

    def step(params, slots, ids, segments, cache):
        axes = {"cache": cache.row_axes()}
        apply = lora.lora(model.apply, on_dense="error", adapters_of=slots, row_axes=axes)
        return apply(params, ids, segments, cache=cache)

    slots, mixed = jnp.array(SLOTS), lora.join(params, lora.stack(overlays))
    first = (mixed, slots, IDS[:, :1], SEGMENTS[:, :1], cache)
    compiled = jax.jit(step, donate_argnums=4).lower(*first).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    of_a_layer = 4 * 2 * 2048 * 16 * 4  # bytes of all rows' keys
    assert "scatter" not in text
    assert memory.alias_size_in_bytes > 4 * of_a_layer
    if not scan:  # a scan copies what it takes and what it returns, without adapters too
        assert memory.temp_size_in_bytes < of_a_layer / 2

    alone = jax.jit(model.apply)
    caches = [model.init_cache(1, 2048) for _ in SLOTS]
    for t in range(IDS.shape[1]):
        ids, segments = IDS[:, t : t + 1], SEGMENTS[:, t : t + 1]
        logits, cache = compiled(mixed, slots, ids, segments, cache)
        for row, slot in enumerate(SLOTS):
            own = with_adapter(params, overlays, slot)
            one = slice(row, row + 1)
            wanted, caches[row] = alone(own, ids[one], segments[one], caches[row])
            if segments[row, 0]:
                np.testing.assert_allclose(logits[one], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 2], r"one slot per row of ids, 4 of them, got shape \(3,\)"),
        ([[0, 1, 2, 0]], r"one slot per row of ids"),
        ([0, 1, 2, 3], r"no slots \[3\]; the stack has 3"),
        ([0, 1, 2, -2], r"no slots \[-2\]"),
        ([0.0] * 4, "ids must be integers"),
        (["a"] * 4, "ids must be integers"),
    ],
)
def test_slots_that_are_refused(slots, message):
    model = load("mistral")
    params = lora.join(model.params, lora.stack(adapters("mistral")))
    with pytest.raises(lora.ConfigError, match=message):
        continued(model, params, adapters_of=slots)


def test_parameters_without_a_stack_are_refused():
    model = load("mistral")
    for params in (model.params, lora.join(model.params, adapters("mistral")[0])):
        with pytest.raises(lora.StructureError, match="adapters_of: this is not a stack"):
            continued(model, params, adapters_of=SLOTS)
