"""What is given to `wrap` and `join`, of any framework: a model, and adapters of a base."""

from typing import Any

from lora_jax.adapters import split as trees
from lora_jax.core.errors import ConfigError
from lora_jax.core.tree import Wrapped, adapted_nodes


def require_model(caller: str, model: Any, kind: type, library: str) -> None:
    """Raise unless this is a model of a library that is not wrapped yet.

    Args:
      caller: "wrap" or "join", for the message.
      model: what was given.
      kind: the class of all its modules.
      library: what messages call it.

    Raises:
      ConfigError: it is not such a module, or has adapters already.
    """
    if isinstance(model, Wrapped):
        raise ConfigError(
            f"{caller}: the model is wrapped already. Merge it first, model.merge(), or wrap the "
            "model that was given to wrap"
        )
    if not isinstance(model, kind):
        raise ConfigError(
            f"{caller}: pass a model of {library}, got {type(model).__name__}. Any function of a "
            "tree of parameters is adapted by lora_jax.init and lora_jax.lora"
        )


def joined(base: Any, adapters: Any) -> Any:
    """Return a base with adapters: an overlay of it, or a joined tree, whose own base is used.

    Raises:
      StructureError: an overlay does not fit the base; every difference is listed at once.
    """
    nodes = adapted_nodes(adapters)
    whole = bool(nodes) and all(node.w is not None for node in nodes.values())
    return adapters if whole else trees.join(base, adapters)
