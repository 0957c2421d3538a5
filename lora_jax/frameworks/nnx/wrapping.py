"""`wrap` and `join`: an NNX model with new adapters, or with those of a file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lora_jax.adapters.init import init
from lora_jax.adapters.split import split
from lora_jax.core.config import LoraConfig
from lora_jax.core.tree import adapted_nodes
from lora_jax.engine.custom_rules import Rule
from lora_jax.frameworks.given import joined, require_model
from lora_jax.frameworks.nnx.adapted import Adapted
from lora_jax.frameworks.nnx.calls import Call
from lora_jax.frameworks.options import Options, call_model


def wrap(
    model: nnx.Module,
    config: LoraConfig,
    *args: Any,
    init_key: Any = None,
    fn: Callable[..., Any] = call_model,
    rules: Mapping[str, Rule] | None = None,
    on_dense: str = "warn",
    fsdp: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Adapted:
    """Return an NNX model that is `model` with new adapters, of which only the adapters train.

    `model` does not change, and its arrays are shared, not copied. Statistics, random streams and
    other variables of the new model are its own.

    Args:
      model: any NNX model. Parameters that several modules share are adapted once.
      config: what to adapt, and how, as for `lora_jax.init`.
      *args: example arguments of the model: arrays, `ShapeDtypeStruct`s, or what else it takes.
      init_key: a random key for the initial factors, or an `nnx.Rngs`; None is `jax.random.key(0)`.
      fn: a function `fn(model, *args, **kwargs)` in place of calling the model, `Model.encode`.
      rules: what custom primitives do with weights, see `Rule`.
      on_dense: what to do where a weight must be materialized: "warn", "error" or "allow".
      fsdp: the mesh axes that shard weights only to save memory, as for `lora_jax.init`.
      **kwargs: example keyword arguments of the model.

    Raises:
      ConfigError: `model` is not an NNX model, has no parameters, or is wrapped already; or as
        `lora_jax.init` raises it.
      TargetError: a pattern matches nothing, or a target cannot be adapted.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lora_jax as lora
    >>> x = jnp.ones((2, 4))
    >>> tuned = wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lora.LoraConfig(rank=1), x)
    >>> grads = nnx.grad(lambda tuned: tuned(x).sum())(tuned)
    >>> grads["adapters"]["kernel"]["b"].shape, type(tuned.merge()).__name__
    ((1, 3), 'Linear')
    """
    require_model("wrap", model, nnx.Module, "Flax NNX")
    key = _key(init_key)
    call = Call.of(fn, model, args, kwargs)
    # Only the shardings of example arguments say how a batch lies, not those of statistics.
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x
    variables = jax.tree.map(shape, call.variables)
    params = init(
        key, call.params, config, call.pure, variables, call.arrays, rules=rules, fsdp=fsdp
    )
    return _adapted(model, params, Options(fn, on_dense, rules), key)


def join(
    model: nnx.Module,
    adapters: Any,
    *,
    dropout_key: Any = None,
    fn: Callable[..., Any] = call_model,
    rules: Mapping[str, Rule] | None = None,
    on_dense: str = "warn",
) -> Adapted:
    """Return an NNX model that is `model` with these adapters, such as those of a file.

    Args:
      model: the NNX model that the adapters were trained on.
      adapters: an overlay of `nnx.state(model, nnx.Param)`, which `lora.load`, `lora.peft.load` and
        `lora.split` return, or a joined tree, as from `lora.eva`, whose base is used then.
      dropout_key: a random key for the dropout of the adapters, or an `nnx.Rngs`; None is
        `jax.random.key(0)`.
      fn: as for `wrap`.
      rules: as for `wrap`.
      on_dense: as for `wrap`.

    Raises:
      ConfigError: `model` is not an NNX model, or is wrapped already.
      StructureError: the adapters do not fit the model; every difference is listed at once.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lora_jax as lora
    >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    >>> base, adapters = lora.split(wrap(model, lora.LoraConfig(rank=1), x).params())
    >>> join(model, lora.disable(adapters))(x).shape
    (2, 3)
    """
    require_model("join", model, nnx.Module, "Flax NNX")
    params = joined(nnx.state(model, nnx.Param), adapters)
    return _adapted(model, params, Options(fn, on_dense, rules), _key(dropout_key))


def _adapted(model: Any, params: Any, options: Options, key: Any) -> Adapted:
    base, adapters = split(params)
    own = nnx.clone(model)
    nnx.update(own, base)  # an initializer may have changed it
    return Adapted(own, adapted_nodes(adapters), options, jax.random.fold_in(key, 1))


def _key(key: Any) -> jax.Array:
    if key is None:
        return jax.random.key(0)
    if isinstance(key, nnx.Rngs):
        return key.params()
    return key
