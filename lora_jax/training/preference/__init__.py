"""Preference tuning: DPO, ORPO, CPO and SimPO, on pairs of a chosen and a rejected completion.

The losses are functions of log-probabilities; those under the reference come from the base below
the adapters, without a second model.

>>> import jax
>>> import numpy as np
>>> import lora_jax as lora
>>> from lora_jax.training import preference
>>> def model(params, ids, segments):  # a bigram model: each token predicts the next
...     return params["embedding"][ids] @ params["head"]
>>> params = {"embedding": np.eye(5, 8, dtype=np.float32), "head": np.zeros((8, 5), np.float32)}
>>> pair = preference.Pair.of([0], [1, 2], [3])  # token ids: a prompt and two completions
>>> batch = preference.pack_pairs([pair], length=4).arrays
>>> config, ids = lora.LoraConfig(rank=4, targets=["head"]), batch["ids"][0]
>>> params = lora.init(jax.random.key(0), params, config, model, ids, ids)
>>> log_probs = lora.lora(preference.log_probs(model))
>>> reference = log_probs(lora.disable(params), batch)  # those of the base: no second model
>>> found = preference.dpo(log_probs(params, batch), reference, beta=0.1)
>>> round(float(found.losses.mean()), 4)  # log 2, where both agree
0.6931
"""

from lora_jax.training.preference.log_probs import (
    log_probs,
    log_probs_of_frozen_head,
    log_probs_of_trained_head,
    preference_sums,
)
from lora_jax.training.preference.losses import (
    KINDS,
    LogProbs,
    PairLosses,
    cpo,
    dpo,
    orpo,
    simpo,
)
from lora_jax.training.preference.pairs import Pair, Pairs, encode_pairs, pack_pairs
from lora_jax.training.preference.reference import with_reference

__all__ = [
    "KINDS",
    "LogProbs",
    "Pair",
    "PairLosses",
    "Pairs",
    "cpo",
    "dpo",
    "encode_pairs",
    "log_probs",
    "log_probs_of_frozen_head",
    "log_probs_of_trained_head",
    "orpo",
    "pack_pairs",
    "preference_sums",
    "simpo",
    "with_reference",
]
