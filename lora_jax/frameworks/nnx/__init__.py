"""Adapters as ordinary NNX: `wrap` a model, and train, save and merge it as any NNX model.

What trains are `Trained` variables, a kind of `nnx.Param`, and the parameters of the model become
`Frozen` ones, which are not. So `nnx.grad`, `nnx.Optimizer(model, tx, wrt=nnx.Param)` and
`nnx.state(model, nnx.Param)` mean the adapters and nothing else.
"""

from lora_jax.frameworks.nnx.adapted import Adapted
from lora_jax.frameworks.nnx.optimizer import transform
from lora_jax.frameworks.nnx.variables import Frozen, Trained
from lora_jax.frameworks.nnx.wrapping import join, wrap

__all__ = ["Adapted", "Frozen", "Trained", "join", "transform", "wrap"]
