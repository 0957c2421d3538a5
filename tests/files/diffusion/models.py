"""A tiny base of a U-Net, and files for it."""

import numpy as np

from lora_jax import diffusion
from lora_jax.core.layout import Layout
from lora_jax.core.weights import LoraWeight
from lora_jax.files.disk import safetensors_file

NAMING = diffusion.naming("sd15")


ATTENTION = "unet/mid_block/attentions/0/transformer_blocks/0/attn1"


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


RNG = np.random.default_rng(0)


def draw(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


BASE = {
    f"{ATTENTION}/to_q/kernel": draw(6, 8),
    f"{ATTENTION}/to_out/0/kernel": draw(8, 6),
    f"{ATTENTION}/to_out/0/bias": draw(6),
    "unet/conv_in/kernel": draw(3, 3, 4, 6),
    "unet/mid_block/attentions/0/norm/scale": draw(6),
    "text_encoder/text_model/encoder/layers/0/mlp/fc1/kernel": draw(5, 7),
}


def lora(key=KEY, out=8, ins=6, rank=2, **more):
    found = {f"{key}.lora_down.weight": draw(rank, ins), f"{key}.lora_up.weight": draw(out, rank)}
    return found | {f"{key}.{name}": x for name, x in more.items()}


def read(tmp_path, tensors, metadata=None, tree=BASE, naming=NAMING, **options):
    path = tmp_path / "lora.safetensors"
    safetensors_file.write(path, tensors, metadata)
    return diffusion.load(path, tree, naming, **options)


def loha(out=8, ins=6, rank=2, key=KEY):
    shapes = {"w1_a": (out, rank), "w1_b": (rank, ins), "w2_a": (out, rank), "w2_b": (rank, ins)}
    return {f"{key}.hada_{name}": draw(*shape) for name, shape in shapes.items()}


def glora(out=8, ins=6, rank=1, key=KEY):
    shapes = {"a1": (ins, rank), "a2": (rank, ins), "b1": (out, rank), "b2": (rank, ins)}
    return {f"{key}.{name}.weight": draw(*shape) for name, shape in shapes.items()}


def node(a, b, axes, magnitude=None, scale=0.5):
    return LoraWeight(
        None, a, b, np.float32(scale), magnitude, layout=Layout(axes, ("dot_general",))
    )


ADAPTERS = {
    f"{ATTENTION}/to_q/kernel": node(draw(6, 2), draw(2, 8), "io"),
    "unet/conv_in/kernel": node(draw(3, 3, 4, 3), draw(3, 6), "iiio", draw(6)),
}


def save(tmp_path, adapters=ADAPTERS, **options):
    diffusion.save(tmp_path / "lora.safetensors", adapters, NAMING, **options)
    return safetensors_file.read(tmp_path / "lora.safetensors")
