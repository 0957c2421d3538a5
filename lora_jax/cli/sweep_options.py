"""The options of `lora-jax sweep`: those of `train`, with lists in place of what its runs vary."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from lora_jax.cli.parameters.groups import in_adapter, in_optimization
from lora_jax.cli.train_options import TrainOptions

_ALPHAS = "Alphas, as --ranks; default: each rank, so the scale is 1."
_SEEDS = "Random seeds for initialization, data order and dropout."
_SLOTS = "How many runs train at once; the others follow. 0: all."
_HALVING = "Stop the worse runs early, by successive halving, and start others in their places."
_ETA = "With --halving: of this many runs one goes further; each round is as many times longer."

#: Options of `train` for one run -> the lists that stand in their places.
LISTS = {
    "rank": "ranks",
    "alpha": "alphas",
    "lr": "lrs",
    "weight_decay": "weight_decays",
    "dropout": "dropouts",
    "seed": "seeds",
}
_ONE_DEVICE = "the runs of a sweep share one device"
_AT_ITS_END = "a run of a sweep is evaluated when it is judged"
#: Options of `train` that a sweep does not have -> why.
WITHOUT = {
    "adapter": "the runs of a sweep start from new adapters",
    "full": "the runs of a sweep share one frozen base",
    "merge_aware": "the runs of a sweep share one frozen base",
    "router_loss": "the losses of a sweep are those of texts alone",
    "profile": "the steps of a sweep are those of all runs together",
    **dict.fromkeys(("mesh", "coordinator", "processes", "process_id"), _ONE_DEVICE),
    **dict.fromkeys(("eval_every", "patience", "load_best"), _AT_ITS_END),
}


@dataclasses.dataclass(frozen=True)
class SweepOptions(TrainOptions):
    """The options as typer has checked them; lists are texts, as they were given."""

    lists: ClassVar[Mapping[str, str]] = LISTS

    ranks: Annotated[
        str,
        in_adapter(metavar="LIST", help="Ranks of A and B, comma-separated; each with each rate."),
    ] = "8"
    alphas: Annotated[str, in_adapter(metavar="LIST", help=_ALPHAS)] = ""
    lrs: Annotated[str, in_optimization(metavar="LIST", help="Peak learning rates.")] = "2e-4"
    weight_decays: Annotated[
        str, in_optimization(metavar="LIST", help="Weight decays of A and B.")
    ] = "0"
    dropouts: Annotated[
        str, in_adapter(metavar="LIST", help="Dropout rates on the adapter's input.")
    ] = "0"
    seeds: Annotated[str, in_optimization(metavar="LIST", help=_SEEDS)] = "0"
    slots: Annotated[int, in_optimization(min=0, help=_SLOTS)] = 0
    halving: Annotated[bool, in_optimization("--halving", help=_HALVING)] = False
    eta: Annotated[int, in_optimization(min=2, help=_ETA)] = 3
