"""GGUF files from their parts, right or wrong: metadata of any type, tensors of any shape."""

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tests.stress.damaged_files.known_fields import STEERING

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = range(10)
UINT64, INT64, FLOAT64 = 10, 11, 12
_CODES = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f"}
_CODES |= {BOOL: "?", UINT64: "Q", INT64: "q", FLOAT64: "d"}


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]  # in NumPy's order
    data: bytes
    kind: int = 0  # of ggml's: float32


@dataclass
class Parts:
    """The content of a file; a value is (type, value), an array's value (type, [values])."""

    metadata: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def encode(parts: Parts) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(parts.tensors), len(parts.metadata))
    for key, kind, value in parts.metadata:
        head += _string(key) + struct.pack("<I", kind) + _value(kind, value)
    offset, content = 0, b""
    for tensor in parts.tensors:
        head += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        head += struct.pack("<IQ", tensor.kind, offset)
        padded = tensor.data + b"\0" * (-len(tensor.data) % 32)
        content += padded
        offset += len(padded)
    return head + b"\0" * (-len(head) % 32) + content


def decode(data: bytes) -> Parts:
    """Return the parts of a file that `encode` wrote, of float32 tensors."""
    reader = _Reader(data)
    tensors, pairs = reader.numbers("4sIQQ")[2:]
    parts = Parts()
    for _ in range(pairs):
        key, kind = reader.string(), reader.numbers("I")[0]
        parts.metadata.append((key, kind, reader.value(kind)))
    headers = []
    for _ in range(tensors):
        name, axes = reader.string(), reader.numbers("I")[0]
        headers.append((name, reader.numbers(f"{axes}Q")[::-1], *reader.numbers("IQ")))
    start = -(-reader.at // 32) * 32
    for name, shape, kind, offset in headers:
        at = start + offset
        parts.tensors.append(Tensor(name, shape, data[at : at + 4 * int(np.prod(shape))], kind))
    return parts


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, codes: str) -> tuple:
        found = struct.unpack_from("<" + codes, self.data, self.at)
        self.at += struct.calcsize("<" + codes)
        return found

    def string(self) -> str:
        length = self.numbers("Q")[0]
        return self.numbers(f"{length}s")[0].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.numbers("IQ")
            return inner, [self.value(inner) for _ in range(count)]
        return self.numbers(_CODES[kind])[0]


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, values = value
        head = struct.pack("<IQ", inner, len(values))
        return head + b"".join(_value(inner, x) for x in values)
    return struct.pack("<" + _CODES[kind], value)


def typed(value: Any) -> tuple[int, Any]:
    """Return a Python value with the type that it would have in a file."""
    if isinstance(value, list):
        kind = typed(value[0])[0] if value else UINT32
        return ARRAY, (kind, value)
    kinds = {bool: BOOL, str: STRING, float: FLOAT32}
    return kinds.get(type(value), UINT64 if isinstance(value, int) and value >= 0 else INT64), value


_NUMBERS = (0, 1, 2, 3, 7, 100, 127)
#: Values of every type that the format has, small and extreme.
WRONG: tuple[tuple[int, Any], ...] = (
    *((kind, n) for kind in (UINT8, INT8, UINT16, INT32, UINT32, UINT64, INT64) for n in _NUMBERS),
    *((kind, -n) for kind in (INT8, INT32, INT64, FLOAT32, FLOAT64) for n in _NUMBERS),
    *((UINT32, 2**32 - 1), (UINT64, 2**64 - 1), (INT64, -(2**63)), (INT64, 2**63 - 1)),
    *((UINT64, 2**40), (INT32, 2**31 - 1), (BOOL, True), (BOOL, False)),
    *((FLOAT32, x) for x in (0.0, 0.5, -0.0, 1e-38, 3e38, float("nan"), float("inf"), 64.5)),
    *((FLOAT64, x) for x in (1e308, -1e308, float("nan"), float("-inf"), 1e-320, 2.0)),
    *((STRING, x) for x in ("", "a", "llama", "linear", "none", "gpt2", STEERING, "y" * 5000)),
    *((STRING, x) for x in ("{{", "{% for %}", "qwen2", "llama-bpe", "\ud800", "默")),
    *((ARRAY, (kind, [])) for kind in (UINT32, FLOAT32, STRING, BOOL, INT64)),
    *((ARRAY, (kind, [1, 2, 3])) for kind in (UINT8, UINT32, FLOAT32, INT64, FLOAT64)),
    *((ARRAY, (FLOAT32, [float("nan")])), (ARRAY, (INT64, [-1])), (ARRAY, (UINT64, [2**64 - 1]))),
    *((ARRAY, (STRING, ["a", "a"])), (ARRAY, (STRING, ["", "b"])), (ARRAY, (STRING, ["\ud800"]))),
    *((ARRAY, (STRING, [STEERING])), (ARRAY, (STRING, ["a b c", " "])), (ARRAY, (BOOL, [True]))),
    *((ARRAY, (ARRAY, [])), (ARRAY, (INT32, [3] * 300)), (ARRAY, (UINT32, [0]))),
)
#: Keys that readers look at, beside those in the file.
KEYS = (
    *("general.architecture", "general.alignment", "general.name", "general.file_type"),
    *(
        f"llama.{x}"
        for x in (
            *("embedding_length", "feed_forward_length", "block_count", "context_length"),
            *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
            *("attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
            *("rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
            *("rope.scaling.original_context_length", "expert_count", "vocab_size"),
        )
    ),
    *(
        f"tokenizer.ggml.{x}"
        for x in (
            *("model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id"),
            *("eos_token_id", "padding_token_id", "unknown_token_id", "eot_token_id"),
            *("add_bos_token", "add_eos_token", "add_space_prefix"),
        )
    ),
    *("tokenizer.chat_template",),
)


def wrong_metadata(parts: Parts, rng: Random) -> str:
    """Give one to three keys a wrong value, or remove, repeat or rename one."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        keys = [key for key, _, _ in parts.metadata]
        key = rng.choice(keys if rng.random() < 0.6 else KEYS)
        how = rng.choice(["value"] * 8 + ["drop", "twice", "rename"])
        at = keys.index(key) if key in keys else None
        if how == "value" or at is None:
            if at is not None:
                del parts.metadata[at]
            parts.metadata.append((key, *rng.choice(WRONG)))
        elif how == "drop":
            del parts.metadata[at]
        elif how == "twice":
            parts.metadata.append(parts.metadata[at])
        else:
            _, kind, value = parts.metadata[at]
            parts.metadata[at] = (key + rng.choice([STEERING, "x", "y" * 3000]), kind, value)
    return "metadata"


def wrong_element(parts: Parts, rng: Random) -> str:
    """Change one element of an array of the metadata: a token, a merge, a type."""
    arrays = [i for i, (_, kind, value) in enumerate(parts.metadata) if kind == ARRAY and value[1]]
    if not arrays:
        return wrong_metadata(parts, rng)
    at = rng.choice(arrays)
    key, kind, (inner, values) = parts.metadata[at]
    pool = [value for its, value in WRONG if its == inner]
    values = list(values)
    values[rng.randrange(len(values))] = rng.choice(pool) if pool else values[0]
    parts.metadata[at] = (key, kind, (inner, values))
    return f"an element of {key}"


def wrong_tensor(parts: Parts, rng: Random) -> str:
    """Give a tensor another name, type, shape or values; its bytes still fit its shape."""
    tensor = rng.choice(parts.tensors)
    how = rng.choice(["name", "kind", "shape", "zero", "flat", "one", "values", "drop", "twice"])
    if how == "name":
        others = [STEERING, "y" * 3000, "", "blk.999999999999999999999.attn_q.weight", "a/b"]
        others += ["blk.-1.attn_q.weight", "blk.0", "rope_freqs.weight", tensor.name.upper()]
        tensor.name = rng.choice(others)
    elif how == "kind":
        tensor.kind = rng.choice([*range(40), 2**32 - 1])
    elif how == "shape":
        tensor.shape = tensor.shape[::-1]
    elif how == "zero":
        tensor.shape, tensor.data = rng.choice([(0,), (0, 4), (4, 0), (2**63,), (1,)]), b"\0" * 4
    elif how == "flat":
        tensor.shape = (len(tensor.data) // 4,)
    elif how == "one":
        tensor.shape = (1, *tensor.shape)
    elif how == "values":
        value = np.float32(rng.choice([np.nan, np.inf, 3e38, -3e38, 1e-40, 0.0]))
        tensor.data = value.tobytes() * (len(tensor.data) // 4)
    elif how == "drop":
        parts.tensors.remove(tensor)
    else:
        parts.tensors.append(tensor)
    return f"{how} of tensor {tensor.name[:40]!r}"


def mutate(parts: Parts, rng: Random) -> str:
    """Change the parts at random, and return what was changed."""
    metadata = [wrong_metadata] * 3
    return rng.choice([*metadata, wrong_element, wrong_tensor])(parts, rng)
