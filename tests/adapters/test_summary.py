"""Counts and tables; the bloomz-3b line of the notes to the digit, on shapes alone."""

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax import LoraConfig

KEY = jax.random.key(0)


def bloomz_3b():
    """The shapes of bloomz-3b: 30 layers, width 2560, vocabulary 250,880, tied head."""
    width, layers, vocabulary = 2560, 30, 250_880

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def norm():
        return {"scale": shape(width), "bias": shape(width)}

    def dense(n_in, n_out):
        return {"kernel": shape(n_in, n_out), "bias": shape(n_out)}

    block = {
        "input_layernorm": norm(),
        "query_key_value": dense(width, 3 * width),
        "dense": dense(width, width),
        "post_attention_layernorm": norm(),
        "dense_h_to_4h": dense(width, 4 * width),
        "dense_4h_to_h": dense(4 * width, width),
    }
    return {
        "word_embeddings": {"embedding": shape(vocabulary, width)},
        "word_embeddings_layernorm": norm(),
        **{f"h_{i}": block for i in range(layers)},
        "ln_f": norm(),
    }


def test_bloomz_3b():
    config = LoraConfig(rank=8, targets=["query_key_value/kernel"])
    params = lora_jax.init(KEY, bloomz_3b(), config)
    line = lora_jax.summary(params).splitlines()[-1]
    want = "trainable params: 2,457,600 || all params: 3,005,015,040 || trainable%: 0.0818"
    assert line == want
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def test_table_says_how_each_weight_is_used():
    params = {
        "embedding": jnp.ones((11, 4)),
        "kernel": jnp.ones((4, 6)),
        "bias": jnp.zeros(6),
        "conv": jnp.ones((3, 6, 2)),
    }

    def fn(params, ids):
        x = params["embedding"][ids]
        y = jax.lax.conv_general_dilated(
            x @ params["kernel"] + params["bias"][None, None],
            params["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y, x @ params["embedding"].T

    config = LoraConfig(rank=2, targets=["embedding", "kernel", "conv"], train=["bias"])
    adapted = lora_jax.init(KEY, params, config, fn, jnp.zeros((2, 3), int))
    lines = [line.split("  ") for line in lora_jax.summary(adapted).splitlines()]
    table = {line[0]: [cell.strip() for cell in line if cell.strip()] for line in lines[1:-1]}
    assert table["bias"] == ["bias", "[6]", "-", "fully trained", "-", "6"]
    assert table["conv"] == ["conv", "[3, 6, 2]", "iio", "convolution", "2", "40"]
    assert table["embedding"] == ["embedding", "[11, 4]", "io", "lookup, matmul", "2", "30"]
    assert table["kernel"] == ["kernel", "[4, 6]", "io", "matmul", "2", "20"]
    trained = 6 + 40 + 30 + 20
    total = 44 + 24 + 36 + trained  # the trained bias counts once, in `trained`
    assert lora_jax.count_params(adapted) == (trained, total)


def test_a_tree_without_adapters():
    assert lora_jax.summary({"kernel": jnp.ones(3)}).endswith(
        "trainable params: 0 || all params: 3 || trainable%: 0.0000"
    )
