"""The qwix contender: its LoRA provider on a Flax Linen model of the same decoder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import qwix
from flax import traverse_util

from benchmarks import decoder
from benchmarks.contenders import SCALE, Contender, Setting, adamw_start, adamw_step, each_block
from benchmarks.decoder import ADAPTED, Size


class Block(nn.Module):
    """`decoder.block` with an `nn.Dense` per adapted weight."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Map `[batch, time, width]` to the same shape, as the body of a scan."""
        norms = {
            name: self.param(name, nn.initializers.ones, (self.size.width,))
            for name in ("attn_norm", "mlp_norm")
        }
        dense = {
            name: nn.Dense(columns, use_bias=False, name=name)
            for name, (_, columns) in self.size.kernels().items()
        }
        # Each weight is replaced by its module, which `product` calls: the block is the same code.
        call = lambda x, module: module(x)
        return decoder.block(x, norms | dense, heads=self.size.heads, product=call), None


class Blocks(nn.Module):
    """All blocks, from embedded tokens to the input of the last norm."""

    size: Size
    variant: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, time, width]` to the same shape."""
        if self.variant == "unrolled":
            for i in range(self.size.layers):
                x, _ = Block(self.size, name=f"block_{i}")(x)
            return x
        block = Block if self.variant == "scan" else nn.remat(Block, prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.size.layers,
        )
        return scan(self.size, name="blocks")(x, None)[0]


def contender(setting: Setting) -> Contender:
    """Return the training of qwix's LoRA parameters, next to an unchanged base.

    Its only quantized base here is "nf4", 16 values times a float32 scale per 64, where the blocks
    are unrolled: it cannot tile weights that `nn.scan` has stacked.
    """
    quantized = {} if setting.kind is None else {"weight_qtype": setting.kind, "tile_size": 64}

    def model() -> Any:
        provider = qwix.LoraProvider(
            module_path=f".*({'|'.join(ADAPTED)})",
            rank=setting.size.rank,
            alpha=SCALE * setting.size.rank,
            **quantized,
        )
        return qwix.apply_lora_to_model(Blocks(setting.size, setting.variant), provider)

    def loss_of(adapters: Any, base: Any, batch: jax.Array) -> jax.Array:
        blocks = traverse_util.unflatten_dict(base["blocks"] | adapters)
        x = model().apply({"params": blocks}, decoder.embed(base, batch[:, :-1]))
        return decoder.cross_entropy(base, x, batch[:, 1:])

    def make() -> Callable:
        return adamw_step(lambda *args: loss_of(*args))

    def start() -> tuple:
        params = decoder.init(setting.size, setting.variant)
        base = _of_flax(each_block(_kernels, params["layers"]))
        if quantized:
            x = decoder.embed(params, setting.batch()[:, :-1])
            shapes = jax.eval_shape(model().init, jax.random.key(0), x)["params"]
            made = qwix.quantize_params(traverse_util.unflatten_dict(base), shapes)
            base = traverse_util.flatten_dict(made)
        adapters = _of_flax(each_block(_factors, setting.adapters()))
        return adamw_start(adapters), params | {"blocks": base, "layers": ()}, setting.batch()

    return Contender("f", "qwix", make, start)


def _kernels(p: dict[str, Any]) -> dict[str, Any]:
    return {n: {"kernel": leaf} if n in ADAPTED else leaf for n, leaf in p.items()}


def _factors(pairs: dict[str, Any]) -> dict[str, Any]:
    return {n: {"kernel_lora_a": a, "kernel_lora_b": b} for n, (a, b) in pairs.items()}


def _of_flax(layers: Any) -> dict[tuple[str, ...], Any]:
    """Return the blocks under Flax's names, as a flat dict that adapters can be added to."""
    if isinstance(layers, list):
        return traverse_util.flatten_dict({f"block_{i}": p for i, p in enumerate(layers)})
    return traverse_util.flatten_dict({"blocks": layers})
