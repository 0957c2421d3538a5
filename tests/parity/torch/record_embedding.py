"""Record torch.nn.Embedding (torch 2.13) under its options: the oracle of layers/test_embedding.py.

    python -m tests.parity.torch.record_embedding

writes `embedding.safetensors`, with the loss mean((y - target)²). `<case>/<name>`, the names being

    w, ids, target    the table [11, 4] at the start, ids [2, 5] and what they should give
    y, grad           the output, and the gradient of the table
    written           the table after the lookup: max_norm writes into it
    sgd               the table after a step of SGD 0.5 from there

and `sparse/<name>` of two steps of SparseAdam 0.1 on ids_0 and ids_1: w, target, after_0, after_1.
"""

import pathlib
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

FILE = pathlib.Path(__file__).parent / "embedding.safetensors"
SHAPE = (11, 4)
EPS = 1e-30  # SparseAdam adds it before the bias correction, other Adams after
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "padding_from_the_end": {"padding_idx": -1},
    "norm_2": {"max_norm": 1.5},
    "norm_1": {"max_norm": 1.5, "norm_type": 1.0},
    "norm_inf": {"max_norm": 0.8, "norm_type": float("inf")},
    "frequency": {"scale_grad_by_freq": True},
    "all": {"padding_idx": 3, "max_norm": 1.5, "norm_type": 3.0, "scale_grad_by_freq": True},
}


def table(**options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    layer = nn.Embedding(*SHAPE, **options)
    torch.manual_seed(1)
    # all rows, that of padding too, so that an option shows where it acts
    layer.weight.data = torch.randn(SHAPE)
    return layer


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().clone().contiguous().numpy()


def one(options: dict[str, Any]) -> dict[str, np.ndarray]:
    layer = table(**options)
    ids = torch.tensor([[3, 10, 0, 3, 3], [7, 7, 5, 10, 2]])
    numbers = {"w": array(layer.weight), "ids": array(ids)}
    torch.manual_seed(2)
    target = torch.randn(*ids.shape, SHAPE[1])
    y = layer(ids)
    ((y - target) ** 2).mean().backward()
    numbers |= {"target": array(target), "y": array(y), "grad": array(layer.weight.grad)}
    numbers["written"] = array(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    return numbers | {"sgd": array(layer.weight)}


def sparse() -> dict[str, np.ndarray]:
    layer = table(sparse=True)
    optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1, eps=EPS)
    numbers = {"w": array(layer.weight)}
    torch.manual_seed(3)
    target = torch.randn(3, SHAPE[1])
    numbers["target"] = array(target)
    for i, ids in enumerate([[1, 4, 4], [4, 9, 0]]):
        optimizer.zero_grad()
        ((layer(torch.tensor(ids)) - target) ** 2).mean().backward()
        assert layer.weight.grad.is_sparse
        optimizer.step()
        numbers |= {f"ids_{i}": np.array(ids), f"after_{i}": array(layer.weight)}
    return numbers


def main() -> None:
    runs = {name: one(options) for name, options in CASES.items()} | {"sparse": sparse()}
    numbers = {f"{case}/{name}": x for case, run in runs.items() for name, x in run.items()}
    save_file(numbers, FILE)
    FILE.chmod(0o644)
    print(f"{FILE.name}: {len(numbers)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
