"""Whether a program mixes the rows of its batch, and where.

The program is traced with a number of rows that is a multiple of a prime which divides no other
size: an axis is an axis of rows, or has one merged into it, if the prime divides its size.
"""

import math
from collections.abc import Sequence
from typing import Any

from lora_jax.engine import jaxprs

#: Primitives that keep their operand's shape and mix what is along the axes that a parameter names.
_ALONG = {
    "sort": "dimension",
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "rev": "dimensions",
}


def prime_for(sizes: Sequence[int]) -> int:
    """Return a prime that divides none of these sizes.

    >>> prime_for([31, 74])
    41
    """
    candidate = 31
    while any(n and n % candidate == 0 for n in sizes) or any(
        candidate % d == 0 for d in range(2, math.isqrt(candidate) + 1)
    ):
        candidate += 2
    return candidate


def mixed_outputs(
    jaxpr: Any, prime: int, mixed: Sequence[str | None] | None = None
) -> list[str | None]:
    """Return for each output the line and primitive that mixed rows on the way to it, or None.

    Args:
      jaxpr: the program, open.
      prime: divides the number of rows, and no other size.
      mixed: the same of each input; None where nothing was mixed before.
    """
    return _Walk(prime).outputs(jaxpr, mixed or [None] * len(jaxpr.invars))


class _Walk:
    def __init__(self, prime: int):
        self._prime = prime

    def outputs(self, jaxpr: Any, mixed: Sequence[str | None]) -> list[str | None]:
        """Return what mixed the rows of each output of a program, from that of each input."""
        known: dict[Any, str | None] = dict(zip(jaxpr.invars, mixed, strict=True))
        for eqn in jaxpr.eqns:
            before = [known.get(v) if jaxprs.is_var(v) else None for v in eqn.invars]
            known.update(zip(eqn.outvars, self._equation(eqn, before), strict=True))
        return [known.get(v) if jaxprs.is_var(v) else None for v in jaxpr.outvars]

    def _equation(self, eqn: Any, before: Sequence[str | None]) -> Sequence[str | None]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, before)
        if name == "while":
            return self._while(eqn, before)
        if name == "cond":
            return self._cond(eqn, before)
        called = jaxprs.called_program(eqn)
        if called is not None:
            return self.outputs(called[0], before)
        where = next(filter(None, before), None)
        return [where or self._mixes_here(eqn, out) for out in eqn.outvars]

    def _mixes_here(self, eqn: Any, out: Any) -> str | None:
        """Return the line of an equation that mixes rows; None of one that does not."""
        carriers = [v for v in eqn.invars if self._rows(v)]
        if not carriers or not math.prod(out.aval.shape):
            return None
        axes = self._rows(out)
        lost = not axes
        crossed = len(axes) > 1 and all(len(self._rows(v)) < len(axes) for v in carriers)
        if lost or crossed or self._runs_along(eqn):
            return f"`{eqn.primitive.name}` at {jaxprs.source_line(eqn)}"
        return None

    def _rows(self, atom: Any) -> list[int]:
        """Return the axes that are axes of rows, or have them merged into them."""
        shape = getattr(atom.aval, "shape", ())
        return [i for i, size in enumerate(shape) if size and size % self._prime == 0]

    def _runs_along(self, eqn: Any) -> bool:
        parameter = _ALONG.get(eqn.primitive.name)
        if parameter is None:
            return False
        along = eqn.params[parameter]
        along = along if isinstance(along, Sequence) else [along]
        return any(i in self._rows(v) for v in eqn.invars for i in along)

    def _scan(self, eqn: Any, before: Sequence[str | None]) -> Sequence[str | None]:
        body, _ = jaxprs.open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = jaxprs.scan_counts(eqn)
        where = f"`scan` over the rows at {jaxprs.source_line(eqn)}"
        over_rows = any(0 in self._rows(v) for v in eqn.invars[n_consts + n_carry :])
        mixed = list(before)
        if over_rows:
            mixed[n_consts : n_consts + n_carry] = [where] * n_carry
        while True:
            outs = self.outputs(body, mixed)
            carry = mixed[n_consts : n_consts + n_carry]
            joined = [a or b for a, b in zip(carry, outs[:n_carry], strict=True)]
            if joined == carry:
                return outs
            mixed[n_consts : n_consts + n_carry] = joined

    def _while(self, eqn: Any, before: Sequence[str | None]) -> Sequence[str | None]:
        body, _ = jaxprs.open_jaxpr(eqn.params["body_jaxpr"])
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = list(before[n_cond : n_cond + n_body]), list(before[n_cond + n_body :])
        while True:
            outs = self.outputs(body, [*consts, *carry])
            joined = [a or b for a, b in zip(carry, outs, strict=True)]
            if joined == carry:
                return carry
            carry = joined

    def _cond(self, eqn: Any, before: Sequence[str | None]) -> Sequence[str | None]:
        branches = [jaxprs.open_jaxpr(b)[0] for b in eqn.params["branches"]]
        found = [self.outputs(branch, before[1:]) for branch in branches]
        return [before[0] or next(filter(None, outs), None) for outs in zip(*found, strict=True)]
