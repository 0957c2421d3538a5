"""Mutants of `lora.nnx` and `lora.equinox`."""

from tests.stress.mutants.mutant import Mutant

NNX = (["tests/frameworks/test_nnx.py"],)
EQUINOX = (["tests/frameworks/test_equinox.py"],)
BOTH = (["tests/frameworks/test_kinds_of_models.py", "-k", "rules"],)
NNX_KINDS = (["tests/frameworks/test_kinds_of_models.py", "-k", "copies"],)
OUTPUTS = (["tests/engine/test_transform.py", "-k", "outputs"],)

MUTANTS = [
    Mutant(
        "write no statistics back into the model",
        "frameworks/nnx/calls.py",
        "here[path].set_raw_value(_value(new))",
        "pass",
        NNX,
    ),
    Mutant(
        "leave out the variables that a call makes",
        "frameworks/nnx/calls.py",
        "made[path] = new",
        "pass",
        NNX,
    ),
    Mutant(
        "return all variables as changed",
        "frameworks/nnx/calls.py",
        "if path in before and is_same_array(",
        "if path in before and not is_same_array(",
        NNX,
    ),
    Mutant(
        "train the base of an NNX model",
        "frameworks/nnx/variables.py",
        "if not isinstance(variable, nnx.Param):",
        "if True:",
        NNX,
    ),
    Mutant(
        "train the scales of an NNX model",
        "frameworks/nnx/variables.py",
        "Trained(value) if name in TRAINED_FIELDS else Frozen(value)",
        "Trained(value)",
        NNX,
    ),
    Mutant(
        "drop no inputs of adapters where they train",
        "frameworks/nnx/adapted.py",
        "if self.rngs is not None and not self.deterministic:",
        "if False:",
        NNX,
    ),
    Mutant(
        "drop inputs of adapters in an evaluation too",
        "frameworks/nnx/adapted.py",
        "if self.rngs is not None and not self.deterministic:",
        "if self.rngs is not None:",
        NNX,
    ),
    Mutant(
        "put adapters of other shapes",
        "frameworks/nnx/adapted.py",
        "if _spec(new) != _spec(old):",
        "if False:",
        NNX,
    ),
    Mutant(
        "keep the base that an initializer has changed",
        "frameworks/nnx/wrapping.py",
        "nnx.update(own, base)  # an",
        "pass  # an",
        NNX,
    ),
    Mutant(
        "give optimizers of lora updates for the parameters",
        "frameworks/nnx/optimizer.py",
        "None if params is None else overlay(params, lambda x: x)",
        "None if params is None else overlay(updates, lambda x: x)",
        NNX,
    ),
    Mutant(
        "train the base of an Equinox model",
        "frameworks/equinox.py",
        "return eqx.partition(model, mask(model))",
        "return eqx.partition(model, eqx.is_inexact_array)",
        EQUINOX,
    ),
    Mutant(
        "forget the rules of a wrapped model",
        "frameworks/options.py",
        "return lora(fn, on_dense=self.on_dense, rules=self.rules)",
        "return lora(fn, on_dense=self.on_dense)",
        BOTH,
    ),
    Mutant(
        "forget what a wrapped model does where it must materialize",
        "frameworks/options.py",
        "return lora(fn, on_dense=self.on_dense, rules=self.rules)",
        "return lora(fn, rules=self.rules)",
        BOTH,
    ),
    Mutant(
        "call a wrapped Equinox model without its function",
        "frameworks/equinox.py",
        "return self.run(self._options.fn, *args, **kwargs)",
        "return self.run(call_model, *args, **kwargs)",
        EQUINOX,
    ),
    Mutant(
        "leave the dropout of adapters on in views",
        "frameworks/nnx/adapted.py",
        "self.deterministic = deterministic\n",
        "pass\n",
        NNX_KINDS,
    ),
    Mutant(
        "return constants of a program as numbers of Python",
        "engine/program.py",
        "return x if isinstance(x, jax.Array) else jnp.asarray(x)",
        "return x",
        OUTPUTS,
    ),
]
