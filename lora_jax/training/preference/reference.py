"""Log-probabilities under the reference model, computed once for all rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.training.batching import Batch, Data, batches
from lora_jax.training.preference.log_probs import REFERENCE, PairLogProbs


def with_reference(
    log_probs: PairLogProbs,
    params: Any,
    data: Data,
    rows: int,
    place: Callable[[Batch], Any] = jax.device_put,
    mesh: Mesh | None = None,
) -> Data:
    """Return pairs with their log-probabilities under a frozen model, without dropout.

    Args:
      log_probs: for the plain model (`lora_jax.lora` is applied here).
      params: the reference: parameters before training, with adapters or without.
      data: from `pack_pairs`.
      rows: rows per batch.
      place: puts a batch on the device or the devices.
      mesh: of devices, if there are several.

    Returns:
      The data with float32 "reference" `[rows, 2, slots]`.
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    of = lora.lora(lambda params, batch: log_probs(params, batch)[:2])
    run = jax.jit(of, out_shardings=everywhere)
    found = [
        np.stack(run(params, place(batch)), axis=1)
        for batch in batches(Data(without_reference(data)), rows)
    ]
    reference = np.concatenate(found)[: len(data)].astype(np.float32)
    return dataclasses.replace(data, arrays={**data.arrays, REFERENCE: reference})


def without_reference(data: Data) -> dict[str, np.ndarray]:
    """Return the arrays of pairs as they were packed."""
    return {name: x for name, x in data.arrays.items() if name != REFERENCE}
