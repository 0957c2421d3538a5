"""How many parameters LoRA trains (https://arxiv.org/abs/2106.09685, tables 2, 3, 4 and 5).

`init` adapts the real models' trees of `ShapeDtypeStruct`s: it traces the model, finds the kernels
and makes A and B of the shapes that training would use. Nothing is allocated.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from benchmarks import decoder
from benchmarks.decoder import Size
from benchmarks.published.result import Result, Row
from lora_jax.adapters.summary import Counts
from lora_jax.models.encoder.bert import Bert, BertConfig

SOURCE = "2106.09685"
GPT3 = Size(layers=96, width=12288, heads=96, vocabulary=50257, batch=1, time=2048)
GPT2_MEDIUM = Size(layers=24, width=1024, heads=16, vocabulary=50257, batch=1, time=1024)
GPT2_LARGE = Size(layers=36, width=1280, heads=20, vocabulary=50257, batch=1, time=1024)
# RoBERTa is BERT's encoder with other embeddings: positions start at 2, one token type.
roberta = partial(BertConfig, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ROBERTA_BASE = roberta(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
)
ROBERTA_LARGE = roberta(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def decoder_shapes(size: Size, dtype: Any = jnp.float32) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Return (parameters, tokens) of a decoder with stacked layers, as shapes."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    layers = {name: array(size.layers, *shape) for name, shape in size.kernels().items()}
    norms = {name: array(size.layers, size.width) for name in ("attn_norm", "mlp_norm")}
    params = {
        "embed": array(size.vocabulary, size.width),
        "positions": array(size.time, size.width),
        "layers": layers | norms,
        "norm": array(size.width),
        "unembed": array(size.width, size.vocabulary),
    }
    return params, jax.ShapeDtypeStruct((size.batch, size.time + 1), jnp.int32)


def of_decoder(size: Size, rank: int, targets: Sequence[str]) -> Counts:
    """Count what LoRA of this rank trains in a decoder of this size."""
    params, tokens = decoder_shapes(size)
    config = lora_jax.LoraConfig(rank=rank, targets=targets)
    loss = lambda params, tokens: decoder.loss(params, tokens, size.heads, "scan")
    return lora_jax.count_params(lora_jax.init(jax.random.key(0), params, config, loss, tokens))


def of_encoder(config: BertConfig, rank: int) -> Counts:
    """Count what LoRA of this rank on query and value kernels trains in an encoder."""
    model = Bert(config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
    lora = lora_jax.LoraConfig(rank=rank, targets=["query/kernel", "value/kernel"])
    adapted = lora_jax.init(jax.random.key(0), params, lora, model.apply, ids, ids)
    return lora_jax.count_params(adapted)


QV, QKVO = ("q", "v"), ("q", "k", "v", "o")
#: (model, rank, kernels, the paper's figure: in full by its formula, 2 · weights · width · r, or as
#: printed, in millions to so many digits)
DECODERS = (
    ("GPT-3 175B", GPT3, 1, QV, 4_718_592, 0),
    ("GPT-3 175B", GPT3, 4, QV, 18_874_368, 0),
    ("GPT-3 175B", GPT3, 8, QV, 37.7, 1),
    ("GPT-3 175B", GPT3, 2, QKVO, 18, 0),
    ("GPT-2 medium", GPT2_MEDIUM, 4, QV, 0.35, 2),
    ("GPT-2 large", GPT2_LARGE, 4, QV, 0.77, 2),
)
ENCODERS = (("RoBERTa base", ROBERTA_BASE, 294_912, 0), ("RoBERTa large", ROBERTA_LARGE, 0.8, 1))
DIFFERS = (
    "the paper's own formula, 2 · weights · width · r, gives ours; the figure in its table 3 is "
    "the one that the same table has for PreLayer"
)


def row(setting: str, counts: Counts, published: float, digits: int) -> Row:
    """Compare our count with a figure that is exact, or rounded (or truncated) to millions."""
    exact = published > 1000
    unit = 1 if exact else 1e6
    agrees = abs(counts.trainable - published * unit) < (1 if exact else unit * 10.0**-digits)
    return Row(
        "parameters that train",
        SOURCE,
        setting,
        f"{published:,}" if exact else f"{published} M",
        f"{counts.trainable:,}",
        agrees,
        "" if agrees else DIFFERS,
    )


def run() -> Result:
    """Count every model of the paper that one of the two architectures here can represent."""
    rows = [
        row(f"{name}, r={rank} on {','.join(targets)}", of_decoder(size, rank, targets), *figure)
        for name, size, rank, targets, *figure in DECODERS
    ]
    rows += [
        row(f"{name}, r=8 on q,v", of_encoder(config, 8), *figure)
        for name, config, *figure in ENCODERS
    ]
    return Result(rows)
