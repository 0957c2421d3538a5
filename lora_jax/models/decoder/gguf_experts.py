"""Experts in GGUF files: llama.cpp keeps gate, up and down apart, each `[experts, out, in]`."""

from collections.abc import Callable, Iterator

from lora_jax.files.naming import Entry

Rows = Callable[[], tuple[Entry, ...]]
_LAYER = "blk.{n}."


def _layers(rows: Callable[[str, str, str], Iterator[Entry]]) -> Rows:
    """Return rows of layers that are stacked or not; the arguments are path, axis and stack."""

    def both() -> tuple[Entry, ...]:
        return (*rows("layer_{n}/mlp", "", ""), *rows("layers/mlp", "n ", "n"))

    return both


def _router(path: str, axis: str, stack: str, bias: bool) -> Iterator[Entry]:
    name = f"{_LAYER}ffn_gate_inp"
    axes = "o i -> n i o" if stack else ""
    yield Entry(f"{name}.weight", f"{path}/router/kernel", "linear", axes)
    if bias:
        yield Entry(f"{name}.bias", f"{path}/router/bias", "", "o -> n o" if stack else "")


def _separate(path: str, axis: str, stack: str) -> Iterator[Entry]:
    yield from _router(path, axis, stack, bias=False)
    for name in ("gate", "up", "down"):
        yield Entry(
            f"{_LAYER}ffn_{name}_exps.weight",
            f"{path}/experts/{name}/kernel",
            "experts",
            f"e o i -> {axis}e i o",
        )


def _of_gpt_oss(path: str, axis: str, stack: str) -> Iterator[Entry]:
    """Yield rows whose gate and up alternate in our leaf, as in Hugging Face's file."""
    yield from _router(path, axis, stack, bias=True)
    both = tuple(f"{_LAYER}ffn_{name}_exps" for name in ("gate", "up"))
    leaf, two = f"{path}/experts/gate_up", {"two": 2}
    yield Entry(
        tuple(f"{name}.weight" for name in both),
        f"{leaf}/kernel",
        "experts",
        f"e (two o) i -> {axis}e i (o two)",
        two,
    )
    # rows without a kind are joined along the first axis
    yield Entry(
        tuple(f"{name}.bias" for name in both),
        f"{leaf}/bias",
        "",
        f"(two e) o -> {axis}e (o two)",
        two,
    )
    down = f"{_LAYER}ffn_down_exps"
    yield Entry(f"{down}.weight", f"{path}/experts/down/kernel", "experts", f"e o i -> {axis}e i o")
    yield Entry(f"{down}.bias", f"{path}/experts/down/bias", "", f"e o -> {axis}e o")
    sinks = path.replace("mlp", "attention/sinks")
    yield Entry(f"{_LAYER}attn_sinks.weight", sinks, "", f"h -> {axis}h")


#: Mixtral's and Qwen3-MoE's.
SEPARATE = _layers(_separate)
GPT_OSS = _layers(_of_gpt_oss)


def no_rows() -> tuple[Entry, ...]:
    return ()
