"""The auxiliary loss of routers, and layers without experts, against `transformers` 5.24.

See record_models.py: the mean cross-entropy plus half the routers' loss, and its gradient.
"""

import json
from functools import partial

import jax
import numpy as np
import pytest

from lora_jax import models, training
from lora_jax.core.errors import ConfigError
from tests.models.decoder.test_decoder import error
from tests.models.recorded import EXPERTS, FIXTURES, MIXED, expected, load

pytestmark = pytest.mark.usefixtures("quick_compile")
RECORDED = json.loads((FIXTURES / "router_losses.json").read_text())
CASES = [
    pytest.param(MIXED, False),
    *(pytest.param(x, scan, marks=pytest.mark.slow) for x in EXPERTS for scan in (False, True)),
]


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_loss_and_gradient_are_those_of_transformers(name, scan):
    model, given, want = load(name, scan=scan), expected(name), RECORDED[name]
    ids, mask = (given[key].astype(np.int32) for key in ("ids", "mask"))
    weights = np.pad(mask[:, 1:] * mask[:, :-1], [(0, 0), (1, 0)])  # none is predicted from padding
    batch = {"ids": ids, "segments": mask, "weights": weights}
    hidden = models.hidden_with_router_loss(model.module)
    logits = lambda params, states: model.apply(params, states, method="logits")
    make = partial(training.language_sums_of_trained_head, logits=logits)
    loss = training.with_router_loss(make, hidden, 0.5)

    @jax.jit
    def found(params):
        of = lambda params: loss(params, batch)
        of_routers = hidden(params, ids[:, :-1], mask[:, :-1])[1]
        mean = lambda params: of(params)["loss"] / of(params)["weight"]
        outputs = model.apply(params, ids, mask)
        return *jax.value_and_grad(mean)(params), of_routers, outputs

    value, gradient, of_routers, outputs = found(model.params)
    assert error(name, outputs) < 3e-5  # for logits up to 5
    np.testing.assert_allclose(of_routers, want["routers"], rtol=1e-5)
    np.testing.assert_allclose(value, want["loss"], rtol=1e-5)
    number = want["layer"]
    layer = gradient["layers" if scan else f"layer_{number}"]["mlp"]["router"]["kernel"]
    norm = np.linalg.norm(layer[number] if scan else layer)
    np.testing.assert_allclose(norm, want["gradient"], rtol=1e-5)


def test_layers_of_two_sorts_are_not_stacked():
    kinds = [sorted(load(MIXED).params[f"layer_{i}"]["mlp"]) for i in range(4)]
    assert kinds == [["down", "gate", "up"], ["experts", "router"]] + 2 * [["down", "gate", "up"]]
    with pytest.raises(ValueError, match=r"mlp_only_layers and decoder_sparse_step"):
        models.load(FIXTURES / MIXED, scan=True)


def test_a_model_without_experts_has_no_routers():
    with pytest.raises(ConfigError, match="has no experts"):
        models.hidden_with_router_loss(load("qwen3").module)
