"""Layers as models are built of them."""

import flax.linen as nn
import jax.numpy as jnp

from tests.programs.table import case, linen, normal


@case(layouts={"kernel": "io"})
def dense(dtype):
    return linen(nn.Dense(5, param_dtype=dtype), normal(0, (2, 3, 7), dtype))


@case(layouts={"Dense_0/kernel": "io", "Dense_1/kernel": "io"})
def mlp(dtype):
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(11, param_dtype=dtype)(x))
            return nn.Dense(5, param_dtype=dtype)(x)

    return linen(Mlp(), normal(0, (3, 7), dtype))


@case(layouts={"kernel": "iioo"})
def dense_general(dtype):
    module = nn.DenseGeneral((3, 5), axis=(-2, -1), param_dtype=dtype)
    return linen(module, normal(0, (2, 4, 7), dtype))


@case(
    layouts={
        "query/kernel": "ioo",
        "key/kernel": "ioo",
        "value/kernel": "ioo",
        "out/kernel": "iio",
    }
)
def attention(dtype):
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=15, param_dtype=dtype)
    return linen(module, normal(0, (2, 4, 7), dtype))


@case(layouts={"embedding": "io"})
def embed_lookup(dtype):
    ids = jnp.array([[1, 12, 1, 0], [3, 5, 7, 9]])
    return linen(nn.Embed(13, 5, param_dtype=dtype), ids)


@case(layouts={"embed/embedding": "io"})
def tied_attend(dtype):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(13, 5, param_dtype=dtype, dtype=dtype, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    return linen(Tied(), jnp.array([[1, 12, 1, 0], [3, 5, 7, 9]]))
