"""Adapters of a base that their initialization changed, as adapters of the base as it was.

PiSSA and OLoRA subtract `scale · B₀ · A₀` from the weight before training. PEFT recomputes that
from the base when it loads such an adapter; here A₀ and −B₀ become components of the factors.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import linalg

from lora_jax.core.errors import ConfigError
from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.torch_adapters.contents import Contents, TorchBase
from lora_jax.files.torch_adapters.factors import TorchFactors, concatenate

#: A decomposition is unique if what separates it from others is this part of the largest value.
_SEPARATE = 2e-6

#: Start from a weight `[out, in]` and a rank: B₀ and A₀ of the update, or why it is not unique.
_Start = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray] | str]


def undo(found: Contents, config: PeftConfig, model: TorchBase) -> list[str]:
    """Replace the factors in `found` by those of the original base, of twice the rank.

    Dropout is switched off: what the factors subtract must not be dropped, see `on_original`.

    Returns:
      Why single modules cannot be converted; they are removed.

    Raises:
      ConfigError: the initialization cannot be recomputed, or not on this base.
    """
    if not is_determined(config):
        raise ConfigError(cannot_recompute(config))
    start = _STARTS[str(config.init_lora_weights).lower()]
    problems = [f"{name}: PEFT has no {start.__name__[1:]} of experts" for name in found.experts]
    found.experts.clear()
    found.dropout = 0.0
    for name, factors in list(found.factors.items()):
        if model.kind(name) not in ("linear", "conv1d"):
            continue  # PEFT initializes others as usual
        weight = model.value(name)
        if weight is None:
            raise ConfigError(
                f"{_says(config)}: what that subtracted is recomputed from the base, which must "
                "have values here"
            )
        undone = _undo(factors, np.asarray(weight, "float64"), model.kind(name), start)
        if isinstance(undone, str):
            problems.append(f"{name}: {undone}")
            del found.factors[name]
        else:
            found.factors[name] = undone
    return problems


def is_determined(config: PeftConfig) -> bool:
    """Return whether what the initialization subtracted follows from the base alone."""
    return str(config.init_lora_weights).lower() in _STARTS


def cannot_recompute(config: PeftConfig) -> str:
    """Return the message about an initialization that depends on chance or data."""
    return (
        f"{_says(config)} by random numbers or data, so it cannot be recomputed: load the adapter "
        "on the base that the initialization left, with residual=True (--residual on "
        "the command line), or convert it first in PEFT: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _says(config: PeftConfig) -> str:
    return f"init_lora_weights is {config.init_lora_weights!r}, which changed the base"


def _undo(
    factors: TorchFactors, weight: np.ndarray, kind: str, start: _Start
) -> TorchFactors | str:
    if start is _olora and kind == "conv1d":
        return "PEFT has no OLoRA of a Conv1D"
    if not factors.scale > 0:
        return f"its scale is {factors.scale}, but the initialization needs a positive one"
    first = start(weight.T if kind == "conv1d" else weight, factors.rank)
    if isinstance(first, str):
        return first
    b, a = first
    b = b / factors.scale if start is _pissa else b
    return TorchFactors(
        concatenate([factors.a, a.astype("float32")]),
        concatenate([factors.b, -b.astype("float32")], 1),
        factors.scale,
        factors.magnitude,
    )


def _pissa(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | str:
    """Return U_r·√S_r and √S_r·V_rᵀ of the largest singular triplets; their product is subtracted.

    The eigenvectors of the smaller Gram matrix take a fraction of the time of a whole SVD. In
    float64 they are as exact as PEFT's SVD in float32.
    """
    is_wide = weight.shape[0] <= weight.shape[1]
    side = weight if is_wide else weight.T  # [smaller, larger]
    size = len(side)
    count = min(rank + 1, size)
    squares, vectors = linalg.eigh(side @ side.T, subset_by_index=[size - count, size - 1])
    values = np.sqrt(np.maximum(squares[::-1], 0))
    kept = vectors[:, ::-1][:, :rank]
    if count > rank and values[rank - 1] - values[rank] <= _SEPARATE * values[0] < values[rank - 1]:
        return f"its singular values {rank} and {rank + 1} are equal, so PiSSA's are not determined"
    root = np.sqrt(values[:rank])
    scaled = kept.T @ side / np.where(root > 0, root, 1)[:, None]
    return (kept * root, scaled) if is_wide else (scaled.T, (kept * root).T)


def _olora(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | str:
    """Return the first columns of Q and rows of R; `scale · Q_r · R_r` is subtracted."""
    q, triangle = np.linalg.qr(weight[:, :rank])
    values = np.linalg.svd(triangle, compute_uv=False)
    if values[-1] <= _SEPARATE * values[0]:
        return f"its first {rank} columns are linearly dependent, so OLoRA's Q is not determined"
    return q, q.T @ weight


_STARTS: dict[str, Any] = {"pissa": _pissa, "olora": _olora}
