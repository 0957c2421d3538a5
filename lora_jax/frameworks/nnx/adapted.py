"""`Adapted`: an NNX model with its adapters, itself an NNX model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from lora_jax.adapters.merge import merge
from lora_jax.adapters.split import join
from lora_jax.adapters.switches import with_dropout
from lora_jax.core.errors import StructureError, grouped
from lora_jax.core.tree import Wrapped, require_adapted
from lora_jax.core.weights import Adapted as Node
from lora_jax.core.weights import LoraWeight
from lora_jax.frameworks.nnx.calls import Call
from lora_jax.frameworks.nnx.variables import (
    factors_in,
    frozen,
    nodes_in,
    thawed,
    tree_of_factors,
)
from lora_jax.frameworks.options import Options


class Adapted(nnx.Module, Wrapped):
    """An NNX model with its adapters: call it as the model, and train it as any NNX model.

    `wrap` and `join` make it. `nnx.jit`, `nnx.grad`, `nnx.Optimizer(..., wrt=nnx.Param)`,
    `train()`, `eval()`, `nnx.split` and `nnx.state` work as for every model, and `nnx.Param` means
    the adapters. Jit a step with `nnx.jit(graph_updates=False)`, which returns the variables that
    changed; without it Flax returns, and so copies, the base in each step. What a call changes in
    the model (statistics, counts of random numbers, sown values) is changed in `model`.

    Attributes:
      model: the model, of the class that was wrapped; its parameters are `Frozen`.
      adapters: the factors, nested as the paths of the weights are:
        `adapters.layers["0"].kernel.a`.
      deterministic: True switches the dropout of the adapters off, as `eval()` does.
    """

    def __init__(
        self,
        model: nnx.Module,
        nodes: Mapping[str, Node],
        options: Options,
        dropout_key: Any,
    ) -> None:
        self.model = frozen(model)
        self.adapters = tree_of_factors(nodes)
        self.deterministic = False
        drops = any(isinstance(node, LoraWeight) and node.dropout for node in nodes.values())
        self.rngs = nnx.Rngs(dropout=dropout_key) if drops else None
        self._options = nnx.static(options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its adapters: every product becomes x·W + (x·A)·(scale·B)."""
        return self.run(self._options.fn, *args, **kwargs)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `fn(model, *args, **kwargs)` with the adapters in the model.

        It is for methods beside `__call__`: `tuned.run(Model.encode, x)`.
        """
        call = Call.of(fn, thawed(self.model), args, kwargs)
        params = join(call.params, nodes_in(self.adapters))
        if self.rngs is not None and not self.deterministic:
            params = with_dropout(params, self.rngs.dropout())
        run = self._options.adapt(call.pure)
        out, changed = run(params, call.variables, call.arrays)
        call.put(changed, (self.model, args, kwargs))
        return out

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switch the dropout of the adapters off or on, in the views that `nnx.view` makes."""
        if deterministic is not None:
            self.deterministic = deterministic

    def params(self) -> nnx.State:
        """Return the parameters with their adapters, as the verbs of `lora_jax` take them.

        It is the `nnx.State` of the model's parameters, with a `LoraWeight` in place of each
        adapted one: for `lora.save`, `lora.summary`, `lora.split`, `lora.peft.save` and so on.
        """
        return join(nnx.state(thawed(self.model), nnx.Param), nodes_in(self.adapters))

    def put(self, adapters: Any) -> None:
        """Replace the values of the adapters, in place, by those of another adapter.

        Args:
          adapters: an overlay or a joined tree with the same weights, ranks and layouts, such as
            `lora.load(...)`, or `lora.set_scale(tuned.params(), 0.5)`; its base is not used.

        Raises:
          StructureError: the adapters differ in more than values; every difference is listed.
        """
        nodes = require_adapted("put", adapters)
        own = {factors.path: factors for factors in factors_in(self.adapters)}
        problems = [f"{path}: only one of the two has an adapter" for path in nodes.keys() ^ own]
        for path in nodes.keys() & own:
            for name, variable in own[path].variables().items():
                new, old = getattr(nodes[path], name, None), variable.get_value()
                if _spec(new) != _spec(old):
                    problems.append(f"{path}: {name} is {_spec(new)}, here it is {_spec(old)}")
        if problems:
            raise StructureError(
                "put: the adapters do not fit these; make another model of them with "
                f"lora_jax.nnx.join(model, adapters):\n{grouped(sorted(problems))}"
            )
        for path, factors in own.items():
            for name, variable in factors.variables().items():
                variable.set_value(getattr(nodes[path], name))

    def merge(self, **options: Any) -> Any:
        """Return a model of its class, with `W + scale · A · B` as its parameters.

        Args:
          **options: those of `lora_jax.merge`, such as `dtype` and `requantize`.

        Returns:
          An ordinary NNX model. With `return_error`, also the errors by path.

        Raises:
          MergeError: an adapter contains NaN or infinity.
        """
        model = nnx.clone(thawed(self.model))
        merged = merge(self.params(), **options)
        errors = None
        if options.get("return_error"):
            merged, errors = merged
        nnx.update(model, merged)
        return model if errors is None else (model, errors)


def _spec(x: Any) -> str:
    """Return the dtypes and shapes of a value, for comparison and messages."""
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x)) or "missing"
