"""Rows with adapters of their own continue as each does alone, on the merged model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from tests.models.recorded import load

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5, 8, 9]]
SLOTS = [1, 0, -1, 2]
STEPS = 7
KINDS = (
    {"rank": 2, "targets": ["query", "value", "mlp"]},
    {"rank": 5, "targets": ["attention", "mlp"], "scaling": "rslora", "train": ["attention_norm"]},
    {"rank": 3, "targets": ["query", "output"], "dora": True},
)


def adapters(model, kinds=KINDS):
    """Return overlays whose effect is large enough to change most tokens."""
    ids = jnp.array([[1, 2]])
    made = []
    for seed, kind in enumerate(kinds):
        config = lora.LoraConfig(alpha=8, **kind)
        params = lora.init(jax.random.key(seed), model.params, config, model.apply, ids)
        keys = iter(jax.random.split(jax.random.key(50 + seed), 200))
        made.append(
            jax.tree.map(
                lambda x, keys=keys: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype)
                if x.ndim > 1
                else x,
                lora.split(params)[1],
            )
        )
    return made


def joined(model, overlays):
    return lora.join(model.params, lora.stack(overlays))


def alone(model, overlays, slot, prompt, **options):
    """Return what a row continues with on the model merged with its adapter, without padding."""
    params = model.params
    if slot >= 0:
        params = lora.merge(lora.join(params, overlays[slot]))
    cache = model.module.init_cache(1, len(prompt) + STEPS)
    return models.generate(model.apply, params, [prompt], cache, steps=STEPS, **options)[0]


def together(model, params, slots, **options):
    ids, segments = models.left_pad(PROMPTS)
    cache = model.module.init_cache(len(slots), ids.shape[1] + STEPS)
    given = {"steps": STEPS, "segments": segments, "adapters_of": slots} | options
    return models.stream(model.apply, params, ids, cache, **given)


@pytest.mark.parametrize(("name", "scan"), [("mistral", False), ("llama_tied", True)])
def test_each_row_continues_as_it_does_alone(name, scan):
    """Mistral's window of 4 is exceeded; three rows are padded on the left."""
    model = load(name, scan=scan)
    overlays = adapters(model)
    found = np.stack(list(together(model, joined(model, overlays), SLOTS)), 1)
    wanted = [alone(model, overlays, i, x) for i, x in zip(SLOTS, PROMPTS, strict=True)]
    np.testing.assert_array_equal(found, wanted)
    plain = [alone(model, overlays, -1, x) for x in PROMPTS]
    assert (found != plain).any(1).tolist() == [True, True, False, True]
