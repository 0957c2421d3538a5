"""Adapters as ordinary Equinox: `wrap` a model, and train, save and merge it as any module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax

from lora_jax.adapters.init import init
from lora_jax.adapters.merge import merge
from lora_jax.adapters.optim import mask
from lora_jax.core.config import LoraConfig
from lora_jax.core.tree import Wrapped, require_adapted
from lora_jax.engine.custom_rules import Rule
from lora_jax.frameworks.given import joined, require_model
from lora_jax.frameworks.options import Options, call_model

__all__ = ["Adapted", "join", "partition", "wrap"]


class Adapted(eqx.Module, Wrapped):
    """An Equinox model with its adapters: call it as the model, and train what `partition` gives.

    `wrap` and `join` make it. It is a pytree as every module, so that `eqx.filter_jit`, `jax.vmap`,
    `eqx.tree_serialise_leaves` and `eqx.nn.inference_mode` work, and so do the functions of
    `lora_jax` that return a tree, such as `lora.set_scale` and `lora.with_dropout`.

    Attributes:
      model: the model, of the class that was wrapped, with a `LoraWeight` for each adapted weight.
    """

    model: Any
    _options: Options = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its adapters: every product becomes x·W + (x·A)·(scale·B)."""
        return self.run(self._options.fn, *args, **kwargs)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `fn(model, *args, **kwargs)` with the adapters in the model.

        It is for methods beside `__call__`: `tuned.run(Model.encode, x)`.
        """
        return self._options.adapt(fn)(self.model, *args, **kwargs)

    def params(self) -> Any:
        """Return the model with its adapted weights, as the verbs of `lora_jax` take it."""
        return self.model

    def merge(self, **options: Any) -> Any:
        """Return a model of its class, with `W + scale · A · B` as its weights.

        Args:
          **options: those of `lora_jax.merge`, such as `dtype` and `requantize`.
        """
        return merge(self.model, **options)


def wrap(
    model: Any,
    config: LoraConfig,
    *args: Any,
    init_key: Any = None,
    fn: Callable[..., Any] = call_model,
    rules: Mapping[str, Rule] | None = None,
    on_dense: str = "warn",
    fsdp: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Adapted:
    """Return an Equinox model that is `model` with new adapters; its arrays are not copied.

    Args:
      model: any `eqx.Module`. Other leaves than arrays, such as functions, stay as they are.
      config: what to adapt, and how, as for `lora_jax.init`.
      *args: example arguments of the model: arrays, `ShapeDtypeStruct`s, or what else it takes. One
        example, if the model is called under `jax.vmap` as `jax.vmap(tuned)(batch)`.
      init_key: a random key for the initial factors; None is `jax.random.key(0)`.
      fn: a function `fn(model, *args, **kwargs)` in place of calling the model, such as one that
        holds the `jax.vmap` of a batch.
      rules: what custom primitives do with weights, see `Rule`.
      on_dense: what to do where a weight must be materialized: "warn", "error" or "allow".
      fsdp: the mesh axes that shard weights only to save memory, as for `lora_jax.init`.
      **kwargs: example keyword arguments of the model.

    Raises:
      ConfigError: `model` is not an Equinox module, or is wrapped already; or as `lora_jax.init`
        raises it.
      TargetError: a pattern matches nothing, or a target cannot be adapted.

    >>> import equinox as eqx, jax, jax.numpy as jnp, lora_jax as lora
    >>> model, x = eqx.nn.Linear(4, 3, key=jax.random.key(0)), jnp.ones((2, 4))
    >>> tuned = wrap(model, lora.LoraConfig(rank=1), x[0])
    >>> jax.vmap(tuned)(x).shape, type(tuned.merge()).__name__
    ((2, 3), 'Linear')
    """
    require_model("wrap", model, eqx.Module, "Equinox")
    key = jax.random.key(0) if init_key is None else init_key
    # A model takes `key=`, and so does `init`.
    call = lambda model, args, kwargs: fn(model, *args, **kwargs)
    params = init(key, model, config, call, args, kwargs, rules=rules, fsdp=fsdp)
    return Adapted(params, Options(fn, on_dense, rules))


def join(
    model: Any,
    adapters: Any,
    *,
    fn: Callable[..., Any] = call_model,
    rules: Mapping[str, Rule] | None = None,
    on_dense: str = "warn",
) -> Adapted:
    """Return an Equinox model that is `model` with these adapters, such as those of a file.

    Args:
      model: the `eqx.Module` that the adapters were trained on.
      adapters: an overlay, which `lora.load`, `lora.peft.load` and `lora.split` return, or a joined
        tree, as from `lora.eva`, whose base is used then.
      fn: as for `wrap`.
      rules: as for `wrap`.
      on_dense: as for `wrap`.

    Raises:
      ConfigError: `model` is not an Equinox module, or is wrapped already.
      StructureError: the adapters do not fit the model; every difference is listed at once.
    """
    require_model("join", model, eqx.Module, "Equinox")
    return Adapted(joined(model, adapters), Options(fn, on_dense, rules))


def partition(model: Any) -> tuple[Any, Any]:
    """Split an adapted model into (what trains, all else); `eqx.combine` is the inverse.

    It is `eqx.partition(model, lora.mask(model))`. Give the optimizer and `eqx.filter_grad` the
    first tree: it has A, B and fully trained leaves, and None everywhere else.

    Args:
      model: what `wrap` or `join` returned, or any module that contains adapted weights.

    Raises:
      StructureError: the model contains no adapters.

    >>> import equinox as eqx, jax, jax.numpy as jnp, lora_jax as lora
    >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    >>> tuned = wrap(model, lora.LoraConfig(rank=1), jnp.ones(4))
    >>> trained, frozen = partition(tuned)
    >>> [x.shape for x in jax.tree.leaves(trained)], [x.shape for x in jax.tree.leaves(frozen)]
    ([(4, 1), (1, 3)], [(3, 4), (), (3,)])
    """
    require_adapted("partition", model)
    return eqx.partition(model, mask(model))
