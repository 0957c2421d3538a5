"""One table of programs; every property of the engine is tested over it. A new program is a row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import lora_jax

KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, its parameters (first argument) and what the library must find out about it.

    `build(dtype)` returns (fn, params, args). `layouts` are the targets and what must be inferred;
    `reverse` is False where JAX itself has no reverse mode for the program, `differentiable` False
    where it has none at all; `dense` names the primitive at which the weight must be made dense.
    """

    name: str
    build: Callable[[Any], tuple[Callable, Any, tuple]]
    layouts: dict[str, str]
    reverse: bool = True
    differentiable: bool = True
    dense: str | None = None
    shapes_collide: bool = False

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


CASES: list[Case] = []
DENSE_CASES: list[Case] = []  # those in which the weight must be made dense


def case(**fields: Any) -> Callable[[Callable], Callable]:
    """Put a program into its table under its function's name."""

    def register(build: Callable) -> Callable:
        table = DENSE_CASES if "dense" in fields else CASES
        table.append(Case(build.__name__, build, **fields))
        return build

    return register


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape, dtype)


def linen(module: nn.Module, *args: Any) -> tuple[Callable, Any, tuple]:
    """fn(params, *args) of a Flax Linen module, with parameters that are all random."""
    variables = module.init(KEY, *args)
    leaves, treedef = jax.tree.flatten(variables["params"])
    leaves = [normal(i, x.shape, x.dtype) / (1 + x.ndim) for i, x in enumerate(leaves)]

    def fn(params: Any, *args: Any) -> Any:
        return module.apply({"params": params}, *args)

    return fn, jax.tree.unflatten(treedef, leaves), args


def adapt(
    built: tuple[Callable, Any, tuple], layouts: dict[str, str], dtype: Any, rank: int = 2
) -> Any:
    """The adapted parameters of a case, B random and the scale 1.5, so that nothing is a no-op."""
    fn, params, args = built
    config = lora_jax.LoraConfig(rank=rank, alpha=1.5 * rank, targets=list(layouts), dtype=dtype)
    params = lora_jax.init(jax.random.key(1), params, config, fn, *args)
    return randomize(params)


def randomize(params: Any) -> Any:
    """Random B, in place of zero, of every adapted weight."""

    def one(node: Any) -> Any:
        if not isinstance(node, lora_jax.LoraWeight):
            return node
        return dataclasses.replace(node, b=normal(3, node.b.shape, node.b.dtype))

    return jax.tree.map(one, params, is_leaf=is_node)


def is_node(x: Any) -> bool:
    return isinstance(x, lora_jax.LoraWeight | lora_jax.TrainedLeaf)


def merged(params: Any) -> Any:
    """The oracle: W + scale·A·B written with nothing of the library's but the layout's letters."""

    def one(node: Any) -> Any:
        if not is_node(node):
            return node
        if isinstance(node, lora_jax.TrainedLeaf):
            return node.value.astype(node.w.dtype)
        axes = node.layout.axes
        order = [i for kind in "bio" for i, letter in enumerate(axes) if letter == kind]
        grouped = [node.w.shape[i] for i in order]
        count = {kind: axes.count(kind) for kind in "bio"}
        stack = grouped[: count["b"]]
        r = node.a.shape[-1]
        a = node.a.reshape(*stack, -1, r)
        b = node.b.reshape(*stack, r, -1)
        update = (a @ b) * node.scale[..., None, None]
        update = jnp.transpose(update.reshape(grouped), [order.index(i) for i in range(len(order))])
        return (node.w.astype(update.dtype) + update).astype(node.w.dtype)

    return jax.tree.map(one, params, is_leaf=is_node)


# --- layers ---------------------------------------------------------------------------------------


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


# --- raw arrays -----------------------------------------------------------------------------------


@case(layouts={"w": "oi"})
def matmul_transposed(dtype):
    return (
        lambda params, x: x @ params["w"].T,
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 5), dtype),),
    )


@case(layouts={"w": "oio"})
def einsum(dtype):
    return (
        lambda params, x: jnp.einsum("hdk,btd->bthk", params["w"], x),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (2, 4, 7), dtype),),
    )


@case(layouts={"up": "oio", "down": "iio"})
def experts(dtype):
    """Every token meets every expert: to the program, experts are one more out or in axis."""

    def fn(params, x, gates):
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]))
        return jnp.einsum("etf,efd,te->td", jnp.swapaxes(h, 0, 1), params["down"], gates)

    params = {"up": normal(1, (3, 7, 11), dtype), "down": normal(2, (3, 11, 7), dtype)}
    return fn, params, (normal(0, (4, 7), dtype), jax.nn.softmax(normal(5, (4, 3), dtype)))


@case(layouts={"w": "bio"})
def experts_batched(dtype):
    return (
        lambda params, x: jnp.einsum("etd,edf->etf", x, params["w"]),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (3, 4, 7), dtype),),
    )


@case(layouts={"w": "io"})
def reshaped_and_scaled(dtype):
    def fn(params, x):
        w = (params["w"] / 3).reshape(7, 3, 5)[:, ::-1].transpose(1, 2, 0)
        return jnp.einsum("td,hkd->thk", x, -w * 2)

    return fn, {"w": normal(1, (7, 15), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "oio"})
def summed_axis(dtype):
    """einsum sums an axis that the other operand lacks before it contracts the rest."""
    return (
        lambda params, x: jnp.einsum("bi,aio->bo", x, params["w"]),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (4, 7), dtype),),
    )


@case(layouts={"qkv": "io"})
def fused_qkv_slices(dtype):
    def fn(params, x):
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        return (x @ q) * (x @ k) + x @ v

    return fn, {"qkv": normal(1, (7, 15), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def embedding_row_then_matrix(dtype):
    """Rows looked up and contracted whole at once, also by one index that counts from the end."""

    def fn(params, ids, matrix):
        last = lax.dynamic_slice(params["w"], (ids[0] - 2, 0), (1, 5))[0]
        return params["w"][ids] @ matrix, matrix.T @ last

    return fn, {"w": normal(1, (7, 5), dtype)}, (jnp.array([1, 6, 1]), normal(0, (5, 4), dtype))


@case(layouts={"w": "bio"})
def stacked_weights_picked_per_example(dtype):
    """vmap makes a gather of the dynamic slice that an index into a stack is."""

    def fn(params, x, which):
        return jax.vmap(lambda row, i: jnp.tanh(row @ params["w"][i]))(x, which)

    w = {"w": normal(1, (3, 7, 5), dtype)}
    return fn, w, (normal(0, (4, 7), dtype), jnp.array([2, 0, 1, -1]))


@case(layouts={"w": "bio"})
def stacked_weights_unpacked(dtype):
    def fn(params, x):
        first, second = params["w"]
        return jnp.tanh(x @ first) @ second + x @ params["w"][1]

    return fn, {"w": normal(1, (2, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"kernel": "io"})
def learned_queries(dtype):
    """Two parameters meet; the right one is the layer, whichever is larger."""

    def fn(params, x):
        return jnp.tanh(params["queries"] @ params["kernel"]) @ x

    params = {"queries": normal(1, (11, 5), dtype), "kernel": normal(2, (5, 3), dtype)}
    return fn, params, (normal(0, (3, 4), dtype),)


@case(layouts={"w": "io"}, shapes_collide=True)
def activation_of_the_same_shape(dtype):
    """x has the weight's shape and value: matched by shape, it would be adapted too."""
    w = normal(1, (6, 6), dtype)
    return (lambda params, x: (x @ params["w"]) @ x, {"w": w}, (w,))


# --- containers -----------------------------------------------------------------------------------


@case(layouts={"kernel": "io"})
def flax_jit(dtype):
    return linen(nn.jit(nn.Dense)(5, param_dtype=dtype), normal(0, (3, 7), dtype))


class Block(nn.Module):
    dtype: Any
    width: int = 7

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(11, param_dtype=self.dtype, name="up")(nn.LayerNorm(param_dtype=self.dtype)(x))
        return x + nn.Dense(self.width, param_dtype=self.dtype, name="down")(nn.silu(h))


@case(layouts={"up/kernel": "io", "down/kernel": "io"})
def flax_remat(dtype):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return linen(nn.remat(Block, policy=policy)(dtype), normal(0, (3, 7), dtype))


@case(layouts={"up/kernel": "io", "down/kernel": "io"})
def flax_remat_nothing_saved(dtype):
    policy = jax.checkpoint_policies.nothing_saveable
    return linen(nn.remat(Block, policy=policy)(dtype), normal(0, (3, 7), dtype))


class Stack(nn.Module):
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        return scan(block(self.dtype, name="block"), x, None)[0]


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def flax_scan(dtype):
    return linen(Stack(dtype), normal(0, (3, 7), dtype))


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def flax_scan_remat(dtype):
    return linen(Stack(dtype, remat=True), normal(0, (3, 7), dtype))


@case(layouts={"kernel": "bio"})
def flax_vmap(dtype):
    module = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=3
    )
    return linen(module(5, param_dtype=dtype), normal(0, (3, 4, 7), dtype))


@case(layouts={"shared/kernel": "io"})
def shared_module(dtype):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(7, param_dtype=dtype, name="shared")
            return layer(jnp.tanh(layer(x)))

    return linen(Shared(), normal(0, (3, 7), dtype))


@case(layouts={"w": "io"})
def scan_broadcast_weights(dtype):
    def fn(params, xs):
        def step(h, x):
            h = jnp.tanh(h @ params["w"] + x)
            return h, h.sum()

        return lax.scan(step, jnp.zeros((3, 7), dtype), xs)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (5, 3, 7), dtype),)


@case(layouts={"w": "bio"})
def scan_over_stacked_weights(dtype):
    def fn(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h[0]), x, params["w"], reverse=True)

    return fn, {"w": normal(1, (4, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "bio"})
def stacked_weights_indexed_in_a_loop(dtype):
    def fn(params, x):
        return lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ params["w"][i]), x)

    return fn, {"w": normal(1, (4, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"})
def fori_loop_carries_params(dtype):
    def fn(params, x):
        def body(i, carry):
            params, h = carry
            return params, jnp.tanh(h @ params["w"])

        return lax.fori_loop(0, 3, body, (params, x))[1]

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, reverse=False)
def while_loop(dtype):
    def fn(params, x):
        def cond(carry):
            return (carry[0] < 3) & ((carry[1] @ params["w"]).sum() < 1e3)

        return lax.while_loop(cond, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, x))[1]

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"})
def cond(dtype):
    def fn(params, x, flag):
        return lax.cond(flag, lambda: jnp.tanh(x @ params["w"]), lambda: x @ (2 * params["w"]))

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array(True))


@case(layouts={"w": "io"})
def switch(dtype):
    def fn(params, x, i):
        branches = [lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w), lambda w, x: x[:, :5] * 3]
        return lax.switch(i, branches, params["w"], x)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array(1))


@case(layouts={"a": "io", "b": "io"})
def nested_jit(dtype):
    @jax.jit
    def inner(w, x):
        return jnp.tanh(x @ w)

    @jax.jit
    def outer(params, x):
        return inner(params["b"], inner(params["a"], x)), params["a"].T @ x.T

    params = {"a": normal(1, (7, 5), dtype), "b": normal(2, (5, 3), dtype)}
    return outer, params, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def custom_jvp(dtype):
    @jax.custom_jvp
    def f(w, x):
        return jnp.tanh(x @ w)

    @f.defjvp
    def f_jvp(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        y = f(w, x)
        return y, 3 * (1 - y**2) * (x @ dw + dx @ w)  # three times the true one: told apart

    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"first/kernel": "io", "second/kernel": "io"})
def nnx_model(dtype):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(7, 11, param_dtype=dtype, rngs=rngs)
            self.norm = nnx.BatchNorm(11, param_dtype=dtype, use_running_average=True, rngs=rngs)
            self.second = nnx.Linear(11, 5, param_dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    return (
        lambda params, x: nnx.merge(graph, params, rest)(x),
        nnx.to_pure_dict(params),
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"first/kernel": "io", "second/kernel": "io"})
def function_that_is_a_grad(dtype):
    def energy(x, params):
        h = jnp.tanh(x @ params["first"]["kernel"])
        return (jnp.sin(h @ params["second"]["kernel"])).sum()

    params = {
        "first": {"kernel": normal(1, (7, 11), dtype)},
        "second": {"kernel": normal(2, (11, 5), dtype)},
    }
    return (lambda params, x: jax.grad(energy)(x, params), params, (normal(0, (3, 7), dtype),))


@case(layouts={"kernel": "iiio"})
def grad_of_a_convolution(dtype):
    fn, params, (x,) = linen(
        nn.Conv(5, (3, 2), strides=2, param_dtype=dtype), normal(0, (2, 8, 6, 7), dtype)
    )
    return (lambda p, x: jax.grad(lambda x: jnp.sin(fn(p, x)).sum())(x), params, (x,))


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def grad_of_a_scan_remat(dtype):
    fn, params, (x,) = linen(Stack(dtype, remat=True), normal(0, (3, 7), dtype))
    return (lambda p, x: jax.grad(lambda x: jnp.sin(fn(p, x)).sum())(x), params, (x,))


@case(layouts={"w": "io"})
def function_that_is_a_vmap(dtype):
    return (
        lambda params, x: jax.vmap(lambda row: jnp.tanh(row @ params["w"]))(x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


# --- where the weight must be made dense ----------------------------------------------------------


@case(layouts={"kernel": "iiio"}, dense="conv_general_dilated")
def grouped_convolution(dtype):
    module = nn.Conv(6, (3, 2), feature_group_count=2, param_dtype=dtype)
    return linen(module, normal(0, (2, 8, 6, 4), dtype))


@case(layouts={"kernel": "iiio"}, dense="conv_general_dilated")
def depthwise_convolution(dtype):
    module = nn.Conv(8, (3, 3), feature_group_count=8, param_dtype=dtype)
    return linen(module, normal(0, (2, 6, 6, 8), dtype))


@case(layouts={"w": "io"}, dense="custom_vjp_call")
def custom_vjp(dtype):
    @jax.custom_vjp
    def f(w, x):
        return jnp.tanh(x @ w)

    def bwd(saved, g):
        w, x = saved
        g = 5 * g * (1 - jnp.tanh(x @ w) ** 2)  # five times the true one: told apart
        return x.T @ g, g @ w.T

    f.defvjp(lambda w, x: (f(w, x), (w, x)), bwd)
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"}, dense="pure_callback", differentiable=False)
def opaque_kernel(dtype):
    import numpy as np

    def fn(params, x):
        out = jax.ShapeDtypeStruct((3, 5), dtype)
        return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), out, params["w"], x)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="mul")
def masked_weight(dtype):
    """What a mask makes of a weight is contracted: that tells the layout, and runs dense."""

    def fn(params, x):
        return x @ (params["w"] * jnp.tri(7, 5, dtype=dtype))

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="custom_vmap_call", reverse=False)
def custom_vmap(dtype):
    @jax.custom_batching.custom_vmap
    def f(w, x):
        return jnp.tanh(x @ w)

    f.def_vmap(lambda size, batched, w, x: (jax.vmap(lambda x: jnp.tanh(x @ w))(x), True))
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"}, dense="integer_pow")
def weight_decay_term(dtype):
    def fn(params, x):
        return (x @ params["w"]).sum() + (params["w"] ** 2).sum()

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="scan")
def loop_that_changes_the_weight(dtype):
    def fn(params, x):
        def step(w, _):
            return w * 0.5 + 0.1, (x @ w).mean()

        return lax.scan(step, params["w"], None, length=3)[1] + (x @ params["w"]).mean()

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)
