"""One row of a naming: a PyTorch name, a path in the tree, and how their axes relate."""

import dataclasses
import functools
from collections.abc import Mapping

from lora_jax.core.errors import ConfigError
from lora_jax.files.naming.patterns import Groups, parse, placeholders

#: The kinds of PyTorch modules: the roles of the weight's axes, and the default axis pattern.
KINDS: dict[str, tuple[str, str]] = {
    "linear": ("oi", "o i -> i o"),
    "conv1d": ("io", "i o -> i o"),  # GPT-2's layer, which keeps its weight [in, out]
    "embedding": ("io", "n d -> n d"),
    "conv": ("oiiii", "o i h w -> h w i o"),
    "experts": ("boi", "e o i -> e i o"),
    "experts_transposed": ("bio", "e i o -> e i o"),  # a module with is_transposed
    "": ("", ""),
}
RANK = "rank"  # the letter of a factor's rank, reserved in patterns


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a `Naming`: tensors with this name are leaves with this path.

    In names, `{n}` stands for one segment and `{*m}` for several, with dots on one side and slashes
    on the other; both sides share them. A placeholder of `torch` that `path` lacks is a number that
    counts along an axis of the leaf, and `axes` has its letter on the right (stacked layers,
    experts).

    Attributes:
      torch: the tensor's name. With several names, their tensors joined along the out axis (the
        first axis if `kind` is "") are one leaf, like a fused q, k, v in the tree.
      path: the leaf's path. With several paths, one tensor contains these leaves along its out
        axis, like GPT-2's c_attn.
      kind: "linear" (`[out, in]` in PyTorch), "conv1d" (`[in, out]`, GPT-2's), "embedding"
        (`[num, dim]`), "conv" (`[out, in, *kernel]`), "experts" (a parameter
        `[experts, out, in]`), "experts_transposed" (`[experts, in, out]`, in a module with
        `is_transposed = True`), or "" for what cannot have an adapter (a norm, a bias). The name
        of a parameter does not end in ".weight". Rows of several parameters in one module must be
        in the order of the PyTorch module, because PEFT nests their adapters in that order.
      axes: an einops pattern from PyTorch's axes to the leaf's, "(h d) i -> i h d". A rotary
        embedding in another order is a pattern too: "(h two d) i -> i (h d two)".
      sizes: sizes of letters in `axes` that the leaf's shape does not determine.
      first: the number of the first layer of a stacked leaf, where earlier layers are not stacked.
      split: sizes of the joined parts along the out axis; by default from the shapes, or equal.

    Raises:
      ConfigError: a field has an invalid value; the message names the row.

    >>> Entry("layers.{n}.q.weight", "layers/query", "linear", "(h d) i -> n i h d").layout
    'bioo'
    >>> Entry("h.{n}.experts.up_proj", "h/up", "experts", "e o i -> n e i o").layout
    'bbio'
    """

    torch: str | tuple[str, ...]
    path: str | tuple[str, ...]
    kind: str = ""
    axes: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    split: tuple[int, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", tuple(self.split))
        for field in ("torch", "path"):
            value = getattr(self, field)
            if not isinstance(value, str):
                object.__setattr__(self, field, tuple(value))
        problem = self._problem()
        if problem:
            raise ConfigError(f"Entry({self.torch!r}, {self.path!r}): {problem}")

    def _problem(self) -> str | None:
        if self.kind not in KINDS:
            return f"kind {self.kind!r} is not one of {', '.join(map(repr, KINDS))}"
        if len(self.torch_names) > 1 and len(self.paths) > 1:
            return "has several names and several paths; only one of the two may be several"
        marks = [placeholders(name) for name in (*self.torch_names, *self.paths)]
        torch, path = marks[0], marks[-1]
        if any(m != torch for m in marks[: len(self.torch_names)]) or any(
            m != path for m in marks[len(self.torch_names) :]
        ):
            return "all names need the same placeholders, and so do all paths"
        if not path <= torch:
            return f"no PyTorch name has the path's placeholder {', '.join(sorted(path - torch))}"
        if not self.axes and not self.kind:
            return "a stacked leaf needs axes, as in 'd -> n d'" if torch - path else None
        left, right = parse(self.axes or KINDS[self.kind][1])
        names = [x for group in left for x in group] + sorted(torch - path)
        if sorted(names) != sorted(x for group in right for x in group) or RANK in names:
            return f"the two sides of {self.axes!r} do not have the same letters"
        if any((x,) not in right for x in torch - path):
            return f"each of {sorted(torch - path)} must be a separate axis on the right"
        roles = KINDS[self.kind][0]
        if self.kind and not (len(left) == len(roles) or (self.kind == "conv" and len(left) > 2)):
            return f"kind {self.kind!r} has {len(roles)} axes, but {self.axes!r} names {len(left)}"
        if self.has_experts and any(len(g) > 1 and self.roles[g[0]] == "b" for g in right):
            return f"{self.axes!r} puts several axes of experts into one axis of the leaf"
        if self.kind and any(len({self.roles[x] for x in group}) != 1 for group in right):
            return f"{self.axes!r} mixes in and out axes in one axis of the leaf"
        return None

    @property
    def torch_names(self) -> tuple[str, ...]:
        """`torch` as a tuple."""
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def stacked(self) -> tuple[str, ...]:
        """The placeholders that count along an axis of the leaf, in the order of its axes."""
        marks = placeholders(self.torch_names[0]) - placeholders(self.paths[0])
        return tuple(group[0] for group in self.groups(0)[1] if group and group[0] in marks)

    @property
    def batch(self) -> tuple[str, ...]:
        """The letters of the leaf's batch axes: stacked ones and experts, in the leaf's order."""
        if not self.has_experts:
            return self.stacked
        right = self.groups(0)[1]
        return tuple(x for group in right for x in group if self.roles[x] == "b")

    @property
    def has_experts(self) -> bool:
        """Whether the PyTorch tensor contains the weights of several experts."""
        return "b" in KINDS[self.kind][0]

    def groups(self, ndim: int) -> tuple[Groups, Groups]:
        """Return the letters of PyTorch's axes and the leaf's; without a pattern, `ndim` axes."""
        pattern = self.axes or KINDS[self.kind][1]
        if pattern:
            return parse(pattern)
        same = tuple((f"x{i}",) for i in range(ndim))
        return same, same

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """The role of each letter of an adaptable weight: "i", "o" or "b"."""
        left, right = self.groups(0)
        found = dict.fromkeys((x for group in right for x in group), "b")
        for role, group in zip(KINDS[self.kind][0], left, strict=False):
            found.update(dict.fromkeys(group, role))
        return found

    @property
    def layout(self) -> str:
        """The `Layout.axes` of an adaptable leaf: "b", "i" or "o" per axis."""
        return "".join(self.roles[group[0]] for group in self.groups(0)[1])

    @property
    def out_axis(self) -> int:
        """The PyTorch axis along which tensors are joined."""
        return KINDS[self.kind][0].index("o") if self.kind else 0
