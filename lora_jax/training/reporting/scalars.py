"""The numbers of a log record under the names that dashboards group by."""

from lora_jax.core.checks import is_number
from lora_jax.training.log import Record

_NAMES = {"lr": "learning_rate"}
_OTHER = ("step", "seconds", "eval_seconds")


def scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a step as "train/...", or those of an evaluation as "eval/...".

    >>> scalars({"step": 3, "loss": 2.5, "lr": 1e-4, "gradient_norm": 0.5, "seconds": 0.1})
    {'train/loss': 2.5, 'train/learning_rate': 0.0001, 'train/gradient_norm': 0.5}
    >>> scalars({"step": 3, "eval_loss": 2.0, "perplexity": 7.4, "eval_seconds": 0.2})
    {'eval/loss': 2.0, 'eval/perplexity': 7.4}
    """
    group = "eval" if "eval_loss" in record else "train"
    return {
        f"{group}/{_NAMES.get(name, name.removeprefix('eval_'))}": float(x)
        for name, x in record.items()
        if name not in _OTHER and is_number(x)
    }
