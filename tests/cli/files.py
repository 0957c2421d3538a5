"""Small adapters of every kind, written out by hand: two layers, two projections each."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import tensorfile

WIDTH, OUT, RANK, ALPHA = 12, 8, 4, 8
MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qv"]


def factors(seed=0):
    """{module: (A [in, rank], B [rank, out])} in float32."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {module: (draw(WIDTH, RANK), draw(RANK, OUT)) for module in MODULES}


def peft(directory, seed=0, config=(), extra=()):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors(seed).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.T
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.T
    tensorfile.write(
        directory / "adapter_model.safetensors", tensors | dict(extra), {"format": "pt"}
    )
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    values |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny"}
    (directory / "adapter_config.json").write_text(json.dumps(values | dict(config)))
    return directory


def mlx(directory, seed=0):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors(seed).items():
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
    tensorfile.write(directory / "adapters.safetensors", tensors)
    values = {"fine_tune_type": "lora", "num_layers": 2, "model": "tiny"}
    values |= {"lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


def native(path, seed=0):
    """The same adapters over a base that stacks the layers."""
    made = factors(seed)
    base = {p: {"kernel": jnp.zeros((2, WIDTH, OUT))} for p in ("q_proj", "v_proj")}
    config = lora.LoraConfig(
        rank=RANK, alpha=ALPHA, targets=".*", overrides={".*": {"layout": "bio"}}
    )
    params = lora.init(jax.random.key(0), base, config)
    _, adapters = lora.split(params)
    for name in base:
        pairs = [made[f"model.layers.{n}.self_attn.{name}"] for n in range(2)]
        node = adapters[name]["kernel"]
        a, b = (jnp.stack([pair[i] for pair in pairs]) for i in range(2))
        scale = node.scale
        adapters[name]["kernel"] = lora.LoraWeight(None, a, b, scale, layout=node.layout)
    lora.save(path, adapters, {"model": "tiny"}, config=config)
    return path
