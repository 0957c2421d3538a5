"""Random programs: adapted equals merged. `make fuzz` runs thousands of them."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.programs import is_node, merged
from tests.stress.fuzz import numpy_eval
from tests.stress.fuzz.campaign import drawn, smallest
from tests.stress.fuzz.check import check, values
from tests.stress.fuzz.language import Block, Op, Program, Weight, function, operations
from tests.stress.fuzz.rows import check_rows

# ops: 3 = fit(inputs[0]); 4 = w0 reshaped; 5 = what they make
KNOWN = Program(
    weights=(Weight((4, 2), fallback="io"), Weight((2, 3), dtype="float32", layout="oi")),
    inputs=((2, 4),),
    block=Block(
        captures=(0, 1, 2, 3),
        ops=(
            Op("reshape", (0,), ((2, 2, 2), "C")),
            Op("einsum", (2, 0), ("ab,bc->ac",)),
            Op("tanh", (5,)),
            Op("scan", (6, 0), (1, 4, False, 1), (
                Block((1,), (Op("fit", (1,), ((2,),)), Op("einsum", (3, 0), ("a,ab->b",)),
                             Op("fold", (1, 4))), (5, 4)),
            )),
            Op("dot_general", (6, 1), ((((1,), (0,)), ((), ())),)),
        ),
        outs=(4, 7, 8, 9),
    ),
    rank=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "part", [part if part == 1 else pytest.param(part, marks=pytest.mark.slow) for part in range(6)]
)
def test_random_programs(x64, quick_compile, part):
    """Sixty programs; where one fails hypothesis makes it small."""

    def equal(program):
        problem = check(program).problem
        assert problem is None, f"{problem}\n{program}"

    for index in range(10 * part, 10 * (part + 1)):
        drawn(1, index, equal, shrinks=True)


@pytest.mark.slow
def test_random_programs_as_batches_with_many_adapters(x64, quick_compile):
    def equal(program):
        problem = check_rows(program).problem
        assert problem is None, f"{problem}\n{program}"

    for index in range(20):
        drawn(2, index, equal, shrinks=True)


@pytest.mark.parametrize("compute", ["float64", "bfloat16"])
@pytest.mark.parametrize("reverse", [True, False])
def test_a_known_program_compiled(x64, quick_compile, compute, reverse):
    program = dataclasses.replace(KNOWN, compute=compute, reverse=reverse)
    assert check(program, compiled=True).problem is None
    assert eval(repr(program)) == program


def scaled(factor):
    """The oracle with another scale."""

    def one(node):
        return dataclasses.replace(node, scale=node.scale * factor) if is_node(node) else node

    return lambda params: merged(jax.tree.map(one, params, is_leaf=is_node))


def test_a_wrong_engine_is_seen(x64):
    """The oracle is what is wrong here, by one percent of the scale, or by all of it."""
    assert "off by" in check(KNOWN, scaled(1.01)).problem
    coarse = dataclasses.replace(KNOWN, compute="bfloat16")
    assert "off by" in check(coarse, scaled(0.0)).problem


@pytest.mark.slow  # some hundred programs
def test_a_program_that_fails_is_made_small(x64):
    program, problem = smallest(0, 0, lambda program: check(program, scaled(1.01)))
    assert "off by" in problem and len(operations(program.block)) <= 3


def test_what_init_declines_gets_a_layout_of_its_own(x64):
    weights = (Weight((4, 2), fallback="io"), Weight((2, 3, 1), fallback="bio"))
    block = Block((0, 1, 2, 3), (Op("add", (1, 1)),), (4, 0))
    outcome = check(Program(weights, ((2, 4),), block, rank=2))
    assert outcome.problem is None
    assert outcome.declined == {"never contracted": 2, "is above what the weight": 1}
    assert outcome.dense == {"add": 1, "return": 1}


def test_a_crash_is_a_problem_unless_jax_has_it_too(x64):
    def broken(params):
        raise ZeroDivisionError("the engine's")

    assert "crash: ZeroDivisionError" in check(KNOWN, broken).problem
    nonsense = dataclasses.replace(KNOWN.block, ops=(Op("einsum", (0, 0), ("ab,ab->c",)),))
    outcome = check(dataclasses.replace(KNOWN, block=nonsense))
    assert outcome.problem is None and outcome.skipped


def test_numpy_and_xla_agree(x64, quick_compile):
    params, inputs, numbers = values(KNOWN)
    fn = lambda *args: jax.vjp(lambda p, x: function(KNOWN)(p, x, args[2]), *args[:2])[0]
    got = numpy_eval.run(fn, params, inputs, numbers)
    jax.tree.map(np.testing.assert_allclose, got, jax.jit(fn)(params, inputs, numbers))
