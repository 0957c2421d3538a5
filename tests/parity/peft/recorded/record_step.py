"""Record one optimisation step of peft 0.21.2 on torch: the oracle of test_step.py.

    python -m tests.parity.peft.recorded.record_step

writes `step.safetensors`. Every layer kind is run as LoRA, as rsLoRA and as DoRA on the same W, A,
B, x and target, with the loss mean((y - target)²). The keys are `<layer>/<variant>/<name>`:

    w, bias               the base layer, never trained
    a, b                  the factors at the start; B is not zero, so that A has a gradient
    scale                 alpha/r, or alpha/√r
    x, target, y, loss    input (ids of an embedding), target, output and loss at the start
    merged                the weight that PEFT merges to
    grad_a, grad_b, grad_x            gradients at the start (grad_x not of an embedding)
    sgd_a, sgd_b, adam_a, adam_b      the factors after one step, SGD 0.1 or Adam 0.01
    m, grad_m, sgd_m, adam_m          DoRA's magnitude [out], likewise
    m_start               DoRA's magnitude as PEFT starts it: ‖W‖ of every output

All of it is in this project's orientation: W `[in, out]`, an embedding `[vocabulary, features]`, a
convolution's kernel `[*window, in, out]` on `[batch, *space, features]`; A `[*in, rank]`,
B `[rank, out]`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from safetensors.numpy import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

FILE = pathlib.Path(__file__).parent / "step.safetensors"
RANK, ALPHA = 3, 6.0
SGD_RATE, ADAM_RATE = 0.1, 0.01
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}

Move = Callable[[np.ndarray], np.ndarray]


def transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def same(x: np.ndarray) -> np.ndarray:
    return x


def channels_last(x: np.ndarray) -> np.ndarray:
    """Turn [batch, features, *space] into [batch, *space, features]."""
    return np.moveaxis(x, 1, -1)


def kernel(x: np.ndarray) -> np.ndarray:
    """Turn [out, in, *window] into [*window, in, out]."""
    return np.moveaxis(x, (0, 1), (-1, -2))


def mixing(x: np.ndarray) -> np.ndarray:
    """Turn the 1×1 convolution B, [out, rank, 1, ...], into [rank, out]."""
    return x.reshape(x.shape[:2]).T


class Kind(NamedTuple):
    """A layer, an input for it, and how to convert PEFT's arrays to ours."""

    layer: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    w: Move
    a: Move
    b: Move
    activation: Move = same
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)


KINDS = {
    "linear": Kind(
        lambda: nn.Linear(7, 6), lambda: torch.randn(5, 7), transposed, transposed, transposed
    ),
    "conv1d_gpt2": Kind(
        lambda: Conv1D(6, 7),
        lambda: torch.randn(5, 7),
        same,
        transposed,
        transposed,
        options={"fan_in_fan_out": True},
    ),
    "embedding": Kind(
        lambda: nn.Embedding(11, 6),
        lambda: torch.tensor([[1, 4, 4, 9], [0, 4, 10, 2]]),
        same,
        transposed,
        transposed,
    ),
    "conv1d": Kind(
        lambda: nn.Conv1d(4, 6, 3, padding=1),
        lambda: torch.randn(2, 4, 8),
        kernel,
        kernel,
        mixing,
        channels_last,
    ),
    "conv2d": Kind(
        lambda: nn.Conv2d(4, 6, (3, 5), stride=2, padding=1),
        lambda: torch.randn(2, 4, 8, 9),
        kernel,
        kernel,
        mixing,
        channels_last,
    ),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def build(kind: Kind, variant: str) -> Any:
    """Build a PEFT model on a layer, the same for every variant."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], **VARIANTS[variant], **kind.options
    )
    layer = kind.layer()
    if hasattr(layer, "bias"):
        nn.init.normal_(layer.bias)
    return peft.get_peft_model(Model(layer), config)


def trained(model: Any) -> dict[str, nn.Parameter]:
    """Return the trainable parameters: A and B, and DoRA's magnitude as m."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}
    names["lora_magnitude_vector"] = "m"
    known = {n: next(names[part] for part in n.split(".") if part in names) for n in found}
    named = {known[n]: parameter for n, parameter in found.items()}
    assert len(named) == len(found)
    return named


def randomize(model: Any) -> None:
    """Randomize the factors, and a magnitude that no longer equals the norm of W."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(trained(model).items()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.1 * noise) if name == "m" else 0.3 * noise


def run(name: str, variant: str) -> dict[str, np.ndarray]:
    """Return all numbers of one layer kind and variant, in our orientation."""
    kind, model = KINDS[name], build(KINDS[name], variant)
    moves = {"a": kind.a, "b": kind.b, "m": np.ravel}
    layer = model.base_model.model.layer
    numbers = {"w": kind.w(array(layer.base_layer.weight)), "scale": layer.scaling["default"]}
    if getattr(layer.base_layer, "bias", None) is not None:
        numbers["bias"] = array(layer.base_layer.bias)
    if variant == "dora":
        numbers["m_start"] = array(trained(model)["m"]).ravel()
    randomize(model)
    start = {n: p.detach().clone() for n, p in trained(model).items()}
    numbers |= {n: moves[n](array(p)) for n, p in start.items()}

    torch.manual_seed(2)
    x = kind.x()
    target = torch.randn(model(x).shape)
    numbers |= {"x": kind.activation(array(x)), "target": kind.activation(array(target))}
    for optimizer in (
        torch.optim.SGD(trained(model).values(), lr=SGD_RATE),
        torch.optim.Adam(trained(model).values(), lr=ADAM_RATE),
    ):
        for n, p in trained(model).items():
            p.data = start[n].clone()
        optimizer.zero_grad()
        x = x.detach().requires_grad_(x.is_floating_point())
        y = model(x)
        loss = ((y - target) ** 2).mean()
        loss.backward()
        numbers |= {"y": kind.activation(array(y)), "loss": array(loss)}
        numbers |= {f"grad_{n}": moves[n](array(p.grad)) for n, p in trained(model).items()}
        if x.grad is not None:
            numbers["grad_x"] = kind.activation(array(x.grad))
        optimizer.step()
        made = type(optimizer).__name__.lower()
        numbers |= {f"{made}_{n}": moves[n](array(p)) for n, p in trained(model).items()}
    for n, p in trained(model).items():
        p.data = start[n].clone()
    numbers["merged"] = kind.w(array(model.merge_and_unload().layer.weight))
    return {f"{name}/{variant}/{key}": np.asarray(value) for key, value in numbers.items()}


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().clone().numpy()


def main() -> None:
    numbers: dict[str, np.ndarray] = {}
    for name in KINDS:
        for variant in VARIANTS:
            numbers |= run(name, variant)
    save_file({key: np.array(x, order="C") for key, x in numbers.items()}, FILE)
    FILE.chmod(0o644)
    print(f"{FILE.name}: {len(numbers)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
