"""Ways to break the package on purpose, each with the tests that should notice."""

from tests.stress.mutants import (
    decoder,
    engine,
    evaluation,
    experts,
    files,
    frameworks,
    many_adapters,
    other_models,
    quantized,
    serving,
    training,
)

_TABLES = (
    *(engine, quantized, many_adapters, decoder, experts, other_models, files, training),
    *(evaluation, serving, frameworks),
)
MUTANTS = [mutant for table in _TABLES for mutant in table.MUTANTS]
