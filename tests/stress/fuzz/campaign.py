"""Many programs: runs of them with a seed, what was counted, and a failure made small."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import hypothesis
import jax
from hypothesis.configuration import set_hypothesis_home_dir

from tests.stress.fuzz.check import Outcome, check, plain_failure
from tests.stress.fuzz.language import Program
from tests.stress.fuzz.programs import programs

CHUNK = 50  # programs that one process takes at a time
COMPILED = 99  # programs with this seed of their own, one in a hundred, also go through XLA
Check = Callable[[Program], Outcome]
Problem = tuple[int, Program | None, str]  # index, program, what is wrong with it


@dataclasses.dataclass
class Tally:
    """What became of some programs."""

    run: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    declined: Counter = dataclasses.field(default_factory=Counter)
    dense: Counter = dataclasses.field(default_factory=Counter)
    dense_programs: int = 0
    quantized: int = 0  # programs with a quantized weight
    skipped: Counter = dataclasses.field(default_factory=Counter)

    def note(self, index: int, program: Program, outcome: Outcome) -> None:
        self.run += 1
        if outcome.problem is not None:
            self.problems.append((index, program, outcome.problem))
        if outcome.skipped is not None:
            self.skipped[outcome.skipped] += 1
        self.declined.update(outcome.declined)
        self.dense.update(outcome.dense)
        self.dense_programs += bool(outcome.dense)
        self.quantized += any(w.quantized for w in program.weights)

    def __add__(self, other: "Tally") -> "Tally":
        fields = [field.name for field in dataclasses.fields(self)]
        return Tally(*(getattr(self, name) + getattr(other, name) for name in fields))


def configure(folder: str) -> None:
    """JAX as every program here needs it, and a folder that hypothesis may write into."""
    set_hypothesis_home_dir(folder)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)


def check_both_ways(program: Program) -> Outcome:
    """By NumPy; one program in a hundred by XLA too."""
    outcome = check(program)
    if program.seed == COMPILED and outcome.problem is None:
        return check(program, compiled=True)
    return outcome


def drawn(seed: int, index: int, body: Callable[[Program], None], shrinks: bool = False) -> None:
    """Call `body` with program `index` of a seed; where it raises, with ever smaller ones."""
    # Hypothesis makes most examples of one run from one another, and its first is the simplest
    # there is: so every program is a run of its own, the second example of it.
    settings = hypothesis.settings(
        max_examples=2,
        phases=[hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrinks,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    calls = itertools.count()

    def second(program: Program) -> None:
        if next(calls):
            body(program)

    hypothesis.seed(f"{seed}/{index}")(settings(hypothesis.given(programs())(second)))()


def chunk(seed: int, start: int, stop: int, checked: Check = check_both_ways) -> Tally:
    """Programs `start` up to `stop` of a seed."""
    tally = Tally()
    for index in range(start, stop):
        drawn(seed, index, lambda program, i=index: tally.note(i, program, checked(program)))
    jax.clear_caches()  # they would grow with every program
    return tally


def plain(seed: int, index: int) -> str:
    """Run a program on plain weights alone: whether XLA itself survives it."""
    said: list[str] = []
    drawn(seed, index, lambda program: said.append(plain_failure(program) or "runs"))
    return said[-1]


def smallest(seed: int, index: int, checked: Check = check_both_ways) -> tuple[Program, str]:
    """A program that fails, made as small as hypothesis can."""
    last: list[tuple[Program, str]] = []

    def body(program: Program) -> None:
        problem = checked(program).problem
        if problem is not None:
            last.append((program, problem))
            raise AssertionError(problem)

    with contextlib.suppress(AssertionError):
        drawn(seed, index, body, shrinks=True)
    jax.clear_caches()
    return last[-1]
