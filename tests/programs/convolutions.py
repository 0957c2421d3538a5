"""Convolutions: strided, dilated, grouped, transposed, and with their axes in any order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, linen, normal


@case(layouts={"kernel": "iio"})
def conv_1d(dtype):
    return linen(nn.Conv(5, (3,), param_dtype=dtype), normal(0, (2, 8, 7), dtype))


@case(layouts={"kernel": "iiio"})
def conv_2d(dtype):
    return linen(nn.Conv(5, (3, 2), param_dtype=dtype), normal(0, (2, 8, 6, 7), dtype))


@case(layouts={"kernel": "iiio"})
def conv_2d_strided(dtype):
    module = nn.Conv(5, (3, 3), strides=(2, 3), padding="VALID", param_dtype=dtype)
    return linen(module, normal(0, (2, 9, 8, 7), dtype))


@case(layouts={"kernel": "iiio"})
def conv_2d_dilated(dtype):
    module = nn.Conv(5, (3, 2), kernel_dilation=(2, 3), param_dtype=dtype)
    return linen(module, normal(0, (2, 9, 8, 7), dtype))


@case(layouts={"kernel": "oiio"})
def conv_vmapped(dtype):
    """vmap makes one convolution of a stack of them, the stack's axis among the out channels."""

    def fn(params, x):
        conv = lambda k: lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jax.vmap(conv)(params["kernel"])

    return fn, {"kernel": normal(1, (4, 3, 7, 5), dtype)}, (normal(0, (2, 8, 7), dtype),)


@case(layouts={"kernel": "iiio"})
def conv_grouped(dtype):
    module = nn.Conv(10, (3, 2), strides=(2, 1), feature_group_count=2, param_dtype=dtype)
    return linen(module, normal(0, (2, 8, 6, 6), dtype))


@case(layouts={"kernel": "oiii"})
def conv_grouped_channels_first(dtype):
    """PyTorch's order: NCHW images and OIHW kernels, three groups."""

    def fn(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", feature_group_count=3)

    return fn, {"kernel": normal(1, (15, 2, 3, 3), dtype)}, (normal(0, (2, 6, 5, 4), dtype),)


@case(layouts={"kernel": "iiio"}, small=True)
def conv_depthwise(dtype):
    module = nn.Conv(8, (3, 3), feature_group_count=8, param_dtype=dtype)
    return linen(module, normal(0, (2, 6, 6, 8), dtype))


@case(layouts={"kernel": "iio"}, small=True)
def conv_depthwise_with_two_outputs_per_channel(dtype):
    module = nn.Conv(16, (5,), strides=2, feature_group_count=8, param_dtype=dtype)
    return linen(module, normal(0, (2, 9, 8), dtype))


@case(layouts={"kernel": "oii"})
def conv_in_batch_groups(dtype):
    def fn(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", batch_group_count=2)

    return fn, {"kernel": normal(1, (10, 7, 3), dtype)}, (normal(0, (4, 7, 6), dtype),)


@case(layouts={"first/kernel": "iiio", "second/kernel": "iioi"})
def conv_transposed(dtype):
    """`transpose_kernel` is the gradient of a convolution: flipped, out features before in."""

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.ConvTranspose(5, (3, 2), strides=(2, 2), param_dtype=dtype, name="first")(x)
            second = nn.ConvTranspose(
                3,
                (2, 2),
                kernel_dilation=(2, 1),
                transpose_kernel=True,
                param_dtype=dtype,
                name="second",
            )
            return second(jnp.tanh(x))

    return linen(Up(), normal(0, (2, 3, 4, 7), dtype))


@case(layouts={"kernel": "oii"})
def conv_of_the_weight(dtype):
    """The weight as the image: a bank of signals, convolved with filters that are given."""

    def fn(params, x):
        grouped = lax.conv_general_dilated(
            params["kernel"], x[:, :2], (1,), "SAME", feature_group_count=2
        )
        return lax.conv_general_dilated(
            params["kernel"], x, (1,), "SAME", rhs_dilation=(2,)
        ), grouped

    return fn, {"kernel": normal(1, (5, 4, 7), dtype)}, (normal(0, (6, 4, 3), dtype),)


@case(layouts={"kernel": "io"})
def conv_with_a_dense_kernel(dtype):
    """A dense layer written as a convolution with a window of one."""

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"][None], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    return fn, {"kernel": normal(1, (7, 5), dtype)}, (normal(0, (2, 6, 7), dtype),)
