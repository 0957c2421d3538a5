"""The blocks of the benchmarks' decoders as modules of PyTorch, to be adapted by PEFT."""

from collections.abc import Callable
from typing import Any


def blocks(size: Any, feed_forward: Callable[[Any, Any], Any]) -> list[Any]:
    """Return a decoder's blocks, whose linear layers have the names and shapes of `size.kernels()`.

    Args:
      size: has `layers`, `heads`, `width` and `kernels()`.
      feed_forward: `(block, h)` -> what is added after the second norm, by the block's own layers.
    """
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (rows, columns) in size.kernels().items():
                setattr(self, name, nn.Linear(rows, columns, bias=False))
            self.attn_norm = nn.RMSNorm(size.width, eps=1e-6)
            self.mlp_norm = nn.RMSNorm(size.width, eps=1e-6)

        def forward(self, x: Any) -> Any:
            batch, steps, width = x.shape
            h = self.attn_norm(x)
            q, k, v = (
                f(h).view(batch, steps, size.heads, -1).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(mixed.transpose(1, 2).reshape(batch, steps, width))
            return x + feed_forward(self, self.mlp_norm(x))

    return [Block() for _ in range(size.layers)]
