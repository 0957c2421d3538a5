"""The losses of preference tuning, as functions of log-probabilities alone.

All take the log-probabilities of pairs under the model that trains (`policy`), and return a
`PairLosses`; DPO also takes those under the model it must stay near (`reference`). Symbols: y⁺ and
y⁻ are the chosen and the rejected completion of a prompt x, log π(y) the sum of their tokens'
log-probabilities given x and the tokens before, |y| their number, σ the logistic function.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp


class LogProbs(NamedTuple):
    """Log-probabilities of pairs of completions, floating arrays of one shape `[...]`."""

    chosen: jax.Array  # log π(y⁺|x): sums over the tokens of the completions
    rejected: jax.Array  # log π(y⁻|x)
    chosen_tokens: jax.Array  # |y⁺|, at least 1
    rejected_tokens: jax.Array  # |y⁻|, at least 1
    chosen_text: jax.Array  # the mean over all tokens of x and y⁺ but the first


class PairLosses(NamedTuple):
    """What a loss makes of pairs, floating arrays `[...]`."""

    losses: jax.Array
    chosen_rewards: jax.Array  # without gradient
    rejected_rewards: jax.Array


Kind = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]


def dpo(
    policy: LogProbs,
    reference: LogProbs,
    *,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Compute the loss of direct preference optimization.

    With Δ = log π(y⁺)/π_ref(y⁺) - log π(y⁻)/π_ref(y⁻), and Δ̄ the same of log-probabilities that are
    divided by |y|:

    - sigmoid: -(1 - ε) log σ(βΔ) - ε log σ(-βΔ). DPO (Rafailov et al. 2023, arXiv:2305.18290),
      with ε > 0 conservative DPO.
    - hinge: max(0, 1 - βΔ). SLiC-HF (Zhao et al. 2023, arXiv:2305.10425), as RSO normalizes it.
    - ipo: (Δ̄ - 1 / 2β)². IPO (Azar et al. 2023, arXiv:2310.12036), averaged over tokens as its
      authors do; β is their τ.
    - robust: (-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)) / (1 - 2ε). An unbiased loss where a part ε of
      the preferences is flipped (Chowdhury et al. 2024, arXiv:2403.00409).
    - sigmoid_norm: -log σ(βΔ̄), DPO normalized by length (Lambert et al. 2024, arXiv:2411.15124).

    Args:
      policy: under the model that trains.
      reference: under the frozen model; only `chosen` and `rejected` are read.
      kind: one of `KINDS`.
      beta: strength of the pull to the reference, above 0.
      label_smoothing: ε in 0 .. 0.5, for the kinds in `SMOOTHED`.

    Returns:
      Losses, and rewards β log π(y)/π_ref(y).

    Raises:
      ValueError: the kind is unknown, or a number has no meaning for it.
    """
    check(kind, beta, label_smoothing)
    ratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    delta = ratios[0] - ratios[1]
    mean_delta = ratios[0] / policy.chosen_tokens - ratios[1] / policy.rejected_tokens
    losses = _KINDS[kind](delta, mean_delta, beta, label_smoothing)
    return _with_rewards(losses, *(beta * ratio for ratio in ratios))


def orpo(policy: LogProbs, *, beta: float = 0.1) -> PairLosses:
    """Compute the loss of odds ratio preference optimization, which needs no reference.

    With p(y) = exp(log π(y) / |y|) and odds p / (1 - p):
    -log π of the prompt and y⁺ per token - β log σ(log odds(y⁺) - log odds(y⁻)), where β is the
    paper's λ (Hong et al. 2024, arXiv:2403.07691). As in the authors' program, the first term has
    the tokens of the prompt too.

    Returns:
      Losses, and rewards β log p(y).
    """
    chosen, rejected = _means(policy)
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    losses = -policy.chosen_text - beta * jax.nn.log_sigmoid(log_odds)
    return _with_rewards(losses, beta * chosen, beta * rejected)


def cpo(
    policy: LogProbs, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0
) -> PairLosses:
    """Compute the loss of contrastive preference optimization, which needs no reference.

    With Δ = log π(y⁺) - log π(y⁻): -(1 - ε) log σ(βΔ) - ε log σ(-βΔ) - α log π(y⁺) / |y⁺|
    (Xu et al. 2024, arXiv:2401.08417).

    Returns:
      Losses, and rewards β log π(y).
    """
    check("sigmoid", beta, label_smoothing)
    delta = policy.chosen - policy.rejected
    losses = _sigmoid(delta, delta, beta, label_smoothing) - alpha * _means(policy)[0]
    return _with_rewards(losses, beta * policy.chosen, beta * policy.rejected)


def simpo(policy: LogProbs, *, beta: float = 2.0, gamma: float = 0.5) -> PairLosses:
    """Compute the loss of simple preference optimization, which needs no reference.

    -log σ(β log π(y⁺) / |y⁺| - β log π(y⁻) / |y⁻| - γ), where γ is the margin to reach
    (Meng et al. 2024, arXiv:2405.14734).

    Returns:
      Losses, and rewards β log π(y) / |y|.
    """
    chosen, rejected = _means(policy)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)
    return _with_rewards(losses, beta * chosen, beta * rejected)


def check(kind: str, beta: float, label_smoothing: float) -> None:
    """Raise `ValueError` for an unknown kind of DPO's loss, or numbers without a meaning for it."""
    if kind not in _KINDS:
        raise ValueError(f"loss {kind!r} is not one of {', '.join(KINDS)}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label smoothing is for {' and '.join(SMOOTHED)}, not for {kind}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label smoothing must be from 0 to below 0.5, got {label_smoothing}")


def _sigmoid(delta: jax.Array, _: jax.Array, beta: float, smoothing: float) -> jax.Array:
    right, wrong = (jax.nn.log_sigmoid(sign * beta * delta) for sign in (1, -1))
    return -(1 - smoothing) * right - smoothing * wrong if smoothing else -right


def _robust(delta: jax.Array, _: jax.Array, beta: float, smoothing: float) -> jax.Array:
    right, wrong = (jax.nn.log_sigmoid(sign * beta * delta) for sign in (1, -1))
    return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)


#: (Δ, Δ̄, β, ε) -> losses
_KINDS: Mapping[str, Callable[[jax.Array, jax.Array, float, float], jax.Array]] = MappingProxyType(
    {
        "sigmoid": _sigmoid,
        "hinge": lambda delta, _, beta, __: jax.nn.relu(1 - beta * delta),
        "ipo": lambda _, delta, beta, __: (delta - 1 / (2 * beta)) ** 2,
        "robust": _robust,
        "sigmoid_norm": lambda _, delta, beta, __: -jax.nn.log_sigmoid(beta * delta),
    }
)
KINDS: tuple[str, ...] = get_args(Kind)
SMOOTHED = ("sigmoid", "robust")


def _with_rewards(losses: jax.Array, chosen: jax.Array, rejected: jax.Array) -> PairLosses:
    return PairLosses(losses, *map(jax.lax.stop_gradient, (chosen, rejected)))


def _means(policy: LogProbs) -> tuple[jax.Array, jax.Array]:
    """Return the log-probabilities per token."""
    return policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


def _log1mexp(x: jax.Array) -> jax.Array:
    """Compute log(1 - exp(x)) for x < 0; a larger x counts as the last number below 0."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    is_near = x > -jnp.log(2.0)  # to 0, where expm1 keeps the digits
    near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -0.5)))
    return jnp.where(is_near, near, jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x))))
