"""The hypothesis strategy: random programs that are valid by construction."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from tests.programs.tiny_kinds import fitting
from tests.stress.fuzz import containers, contractions, views
from tests.stress.fuzz.builder import Allowed, Builder, Grammar, Step, Value
from tests.stress.fuzz.language import Program, Weight


def one_of(steps: Sequence[Step]) -> Step:
    return lambda b: b.choice(steps)(b)


FLAT_STEPS: list[Step] = [
    *[one_of(views.STEPS)] * 10,
    *[one_of(contractions.STEPS)] * 6,
    *[contractions.activate] * 2,
]
GRAMMAR = Grammar(
    steps=[*FLAT_STEPS, *[one_of(containers.STEPS)] * 4],
    flat_steps=FLAT_STEPS,
    contract=contractions.contraction,
)


def _layout(draw: Callable, ndim: int) -> str:
    """A random layout, with an in and an out axis at least."""
    letters = draw(st.lists(st.sampled_from("iob"), min_size=ndim, max_size=ndim))
    at = draw(st.permutations(range(ndim)))
    letters[at[0]], letters[at[1]] = "i", "o"
    return "".join(letters)


def _quantized(draw: Callable, shape: tuple[int, ...]) -> tuple[str, int] | None:
    """A kind whose blocks divide an axis, for one of two weights."""
    if draw(st.booleans()):
        return None
    axis = draw(st.integers(0, len(shape) - 1))
    return draw(st.sampled_from(fitting(shape[axis]))), axis


def _weight(draw: Callable) -> Weight:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    quantized = _quantized(draw, shape)
    if len(shape) == 1:
        return Weight(shape, adapted=False, quantized=quantized)
    dtype = draw(st.sampled_from(["float64"] * 3 + ["float32"]))
    fallback = _layout(draw, len(shape))
    named = draw(st.integers(0, 9)) >= 7
    adapted = quantized is None or draw(st.integers(0, 9)) < 8
    return Weight(shape, dtype, adapted, fallback if named else None, fallback, quantized)


@st.composite
def programs(draw: Callable, max_steps: int = 6) -> Program:
    """Programs of up to `max_steps` steps (more in blocks) with one adapted weight at least."""
    shape = tuple(draw(st.integers(1, 4)) for _ in range(2))
    matrix = Weight(shape, fallback="io", quantized=_quantized(draw, shape))
    weights = [matrix] + [_weight(draw) for _ in range(draw(st.integers(0, 2)))]
    inputs = [(draw(st.integers(1, 3)), matrix.shape[0])]
    inputs += [tuple(draw(st.lists(st.integers(1, 3), max_size=3)))] if draw(st.booleans()) else []
    forward = draw(st.integers(0, 9)) == 9
    values = [Value(w.shape, "w") for w in weights] + [Value(shape, "x") for shape in inputs]
    allowed = Allowed(while_loop=forward, custom_vjp=not forward)
    b = Builder(draw, [*values, Value((4,), "n")], allowed, GRAMMAR)
    b.fill(draw(st.integers(1, max_steps)))
    used = b.used()
    for i, weight in enumerate(weights):
        if weight.adapted and i not in used and b.chance(80):
            contractions.contraction(b, i)
    block = b.block(range(len(values) + 1), b.outputs(3))
    return Program(
        weights=tuple(weights),
        inputs=tuple(inputs),
        block=block,
        rank=draw(st.integers(1, 2)),
        reverse=not forward,
        compute="bfloat16" if draw(st.integers(0, 19)) == 19 else "float64",
        seed=draw(st.integers(0, 99)),
    )
