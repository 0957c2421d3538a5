"""Round trips of whole models with the real `peft` and `transformers`.

Needs torch, peft and transformers, so the suite does not run it:
`python -m tests.peft.check_models`
(checked with 2.13, 0.21.2 and 5.23). On every recorded model of tests/models/fixtures it

1. trains adapters here, saves them, and loads them with `peft` on the same torch model;
2. loads adapters made by `peft` here;
3. merges, writes the model, and loads it with `transformers`;

and prints the largest differences of logits (BERT: of hidden states) from torch's.
"""

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import optax
import peft as torch_peft
import torch
import transformers

import lora_jax as lora
from lora_jax import models, peft
from tests.models.recorded import FIXTURES

LIMIT = 1e-4
LINEAR = r".*(query|key|value|output|gate|up|down|intermediate)/kernel"
#: Name, stacked or not, and the configuration of the adapters. A tied embedding is left out: `peft`
#: adapts the lookup and not the head, here both uses of the leaf are adapted.
CASES = (
    ("llama", False, lora.LoraConfig(rank=4, alpha=8)),
    ("llama", True, lora.LoraConfig(rank=4, alpha=8)),
    ("llama", True, lora.LoraConfig(rank=4, targets=LINEAR, dora=True)),
    ("llama", False, lora.LoraConfig(rank=3, targets=["query", "value"], scaling="rslora")),
    ("llama", True, lora.LoraConfig(rank=4, targets=LINEAR + "|(embedding|head)/.*")),
    ("llama_tied", False, lora.LoraConfig(rank=4, targets=LINEAR, bias="all")),
    ("llama_tied", True, lora.LoraConfig(rank=4, targets=LINEAR)),
    ("mistral", True, lora.LoraConfig(rank=4, overrides={"query": {"rank": 2, "alpha": 3}})),
    ("qwen2", False, lora.LoraConfig(rank=4)),
    ("qwen2", True, lora.LoraConfig(rank=4, layers=[1])),
    ("bert", False, lora.LoraConfig(rank=4, targets=LINEAR)),
    ("bert", False, lora.LoraConfig(rank=4, targets=["query"], bias="adapted")),
)


def torch_model(source: pathlib.Path) -> transformers.PreTrainedModel:
    """The model in a directory, as `transformers` reads it."""
    kind = transformers.AutoModel if "bert" in str(source) else transformers.AutoModelForCausalLM
    return kind.from_pretrained(source, attn_implementation="eager").eval()


def torch_outputs(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits, or BERT's hidden states."""
    with torch.no_grad():
        found = model(torch.asarray(ids))
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


def trained(model: models.Pretrained, config: lora.LoraConfig, ids: np.ndarray) -> Any:
    """Parameters with adapters after five steps of Adam towards random outputs."""
    segments = np.ones_like(ids)
    params = lora.init(jax.random.key(0), model.params, config, model.apply, ids, segments)
    apply, tx = lora.lora(model.apply, on_dense="error"), lora.freeze(optax.adam(3e-2), params)
    goal = jax.random.normal(jax.random.key(1), (*ids.shape, 1))

    @jax.jit
    def step(params, state):
        loss = lambda params: ((apply(params, ids, segments) - goal) ** 2).mean()
        updates, state = tx.update(jax.grad(loss, allow_int=True)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    return params


def check(name: str, scan: bool, config: lora.LoraConfig) -> tuple[float, ...]:
    """Differences: adapters here to `peft`, the change they make, `peft`'s to here, merged."""
    ids = np.random.default_rng(0).integers(1, 64, (2, 9))
    segments = np.ones_like(ids)
    model = models.load(FIXTURES / name, scan=scan)
    params = trained(model, config, ids)
    apply = jax.jit(lora.lora(model.apply, on_dense="error"))
    ours = np.asarray(apply(params, ids, segments))
    with tempfile.TemporaryDirectory() as folder:
        there, back, merged = (pathlib.Path(folder) / f"{x}_{name}" for x in ("a", "b", "c"))
        peft.save(there, params, model.naming, config=config)
        theirs = torch_peft.PeftModel.from_pretrained(torch_model(FIXTURES / name), there)
        outputs = torch_outputs(theirs, ids)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "lora_" in key:
                    parameter += 0.05 * torch.randn_like(parameter)
        theirs.save_pretrained(back)
        base, _ = lora.split(params)
        read = lora.join(base, peft.load(back, base, model.naming))
        returned = np.abs(apply(read, ids, segments) - torch_outputs(theirs, ids)).max()
        plain = models.Pretrained(**vars(model) | {"params": lora.merge(params)})
        models.save(merged, plain)
        written = np.abs(ours - torch_outputs(torch_model(merged), ids)).max()
    change = np.abs(ours - np.asarray(model.apply(model.params, ids, segments))).max()
    return tuple(map(float, (np.abs(ours - outputs).max(), change, returned, written)))


def main() -> None:
    torch.manual_seed(0)
    print("model       layers    to peft  (change)  from peft  merged")
    worst = 0.0
    for name, scan, config in CASES:
        out, change, back, merged = check(name, scan, config)
        layers = "stacked" if scan else "single"
        print(f"{name:11} {layers:8} {out:8.1e}  {change:8.2f}   {back:8.1e} {merged:8.1e}")
        worst = max(worst, out, back, merged)
        assert change > 100 * LIMIT
    assert worst < LIMIT, worst


if __name__ == "__main__":
    main()
