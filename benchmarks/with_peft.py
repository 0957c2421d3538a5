"""The PEFT contender: the same decoder in PyTorch, in a separate process.

The child loads what the parent wrote, then takes one step per line of input and answers with its
seconds and its loss, so it is idle while the others run.
"""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.contenders import LEARNING_RATE, SCALE, Setting
from benchmarks.decoder import ADAPTED, Size
from benchmarks.torch_blocks import blocks


def is_installed() -> bool:
    """Return whether PEFT is installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


class Peft:
    """The child process."""

    key, label = "g", "PEFT on torch, eager"

    def __init__(self, setting: Setting):
        # PyTorch has no scan: the blocks are a list in every variant
        unrolled = Setting(setting.size, "unrolled")
        params, adapters = unrolled.params(), unrolled.adapters()
        arrays = {name: leaf for name, leaf in params.items() if name != "layers"}
        for i, (block, pairs) in enumerate(zip(params["layers"], adapters, strict=True)):
            arrays |= {f"{i}.{name}": leaf for name, leaf in block.items()}
            arrays |= {f"{i}.{name}.a": a for name, (a, _) in pairs.items()}
            arrays |= {f"{i}.{name}.b": b for name, (_, b) in pairs.items()}
        arrays = jax.device_get(arrays | {"tokens": setting.batch()})
        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name, "arrays.npz")
        np.savez(path, size=list(vars(setting.size).values()), **arrays)
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), setting.variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first_loss = self._ask()[1]

    def _ask(self) -> tuple[float, float]:
        print(file=self._child.stdin, flush=True)
        seconds, loss = self._child.stdout.readline().split()
        return float(seconds), float(loss)

    def step(self) -> tuple[float, float]:
        """Measure the seconds of one step; the second figure, of the call, has no meaning here."""
        return self._ask()[0], math.nan

    def close(self) -> None:
        """End the child."""
        self._child.communicate()
        self._folder.cleanup()


def child(path: str, variant: str) -> None:
    """Take one step per line of standard input."""
    import peft
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    arrays = dict(np.load(path))
    size = Size(*(int(n) for n in arrays["size"]))
    config = peft.LoraConfig(
        r=size.rank, lora_alpha=SCALE * size.rank, target_modules=list(ADAPTED), lora_dropout=0.0
    )
    model = peft.get_peft_model(_decoder(size, variant == "scan_remat"), config)
    _load(model.base_model.model, arrays)
    trained = [p for p in model.parameters() if p.requires_grad]
    # the defaults of optax.adamw, so that both do the same work
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)
    batch = torch.from_numpy(arrays["tokens"].astype(np.int64))
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        print(time.perf_counter() - start, float(loss.detach()), flush=True)


def _decoder(size: Size, remat: bool) -> Any:
    """Return `decoder.loss` as a module: the same equations with `nn.Linear`."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    feed_forward = lambda block, h: block.down(F.gelu(block.up(h), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(size.vocabulary, size.width)
            self.positions = nn.Parameter(torch.zeros(size.time, size.width))
            self.blocks = nn.ModuleList(blocks(size, feed_forward))
            self.norm = nn.RMSNorm(size.width, eps=1e-6)
            self.unembed = nn.Linear(size.width, size.vocabulary, bias=False)

        def forward(self, batch: Any) -> Any:
            x = self.embed(batch[:, :-1]) + self.positions
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if remat else block(x)
            logits = self.unembed(self.norm(x))
            return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return Decoder()


def _load(model: Any, arrays: dict[str, np.ndarray]) -> None:
    """Load the parent's values, so the loss must be the same; PyTorch transposes matrices."""
    import torch

    values = {"positions": arrays["positions"], "norm.weight": arrays["norm"]}
    values |= {"embed.weight": arrays["embed"], "unembed.weight": arrays["unembed"].T}
    for i in range(len(model.blocks)):
        for norm in ("attn_norm", "mlp_norm"):
            values[f"blocks.{i}.{norm}.weight"] = arrays[f"{i}.{norm}"]
        for name in ADAPTED:
            at = f"blocks.{i}.{name}"
            values[f"{at}.base_layer.weight"] = arrays[f"{i}.{name}"].T
            values[f"{at}.lora_A.default.weight"] = arrays[f"{i}.{name}.a"].T
            values[f"{at}.lora_B.default.weight"] = arrays[f"{i}.{name}.b"].T
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in values.items()})


if __name__ == "__main__":
    child(*sys.argv[1:])
