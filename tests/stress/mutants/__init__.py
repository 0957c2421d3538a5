"""Ways to break the package on purpose, each with the tests that should notice."""

from tests.stress.mutants import engine, many_adapters, quantized

MUTANTS = [*engine.MUTANTS, *quantized.MUTANTS, *many_adapters.MUTANTS]
