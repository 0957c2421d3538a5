"""Ways to damage files: each takes the bytes of a set of files and returns others, at random."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from tests.stress.damaged_files import gguf_bytes, known_fields
from tests.stress.damaged_files.known_fields import STEERING, Verbatim, wrong
from tests.stress.damaged_files.subject import Files


class Repeated(dict):
    """A mapping that is written with one key twice."""


def deep(rng: Random) -> Verbatim:
    """Return nested brackets."""
    times = rng.choice([5, 100, 500, 2000, 50_000])
    begin, end = rng.choice([("[", "]"), ('{"a": [', "]}")])
    return Verbatim(begin * times + end * times)


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) within a JSON value."""
    found, pending = [], [value]
    while pending:
        container = pending.pop()
        if isinstance(container, dict | list):
            keys = list(container) if isinstance(container, dict) else range(len(container))
            found += [(container, key) for key in keys]
            pending += [container[key] for key in keys]
    return found


def edit_json(value: Any, rng: Random) -> Any:
    """Change one thing in a JSON value: a value, its type, a key, an item, a pair."""
    value = copy.deepcopy(value)
    found = spots(value)
    if not found:
        return wrong(rng)
    container, key = rng.choice(found)
    how = rng.choice(["value", "value", "near", "drop", "twice", "rename", "swap", "deep"])
    if how == "value":
        container[key] = wrong(rng)
    elif how == "near":
        container[key] = near(container[key], rng)
    elif how == "drop":
        del container[key]
    elif how == "deep":
        container[key] = deep(rng)
    elif how == "swap":
        other, second = rng.choice(found)
        # copies: one of the two may contain the other
        pair = copy.deepcopy(other[second]), copy.deepcopy(container[key])
        container[key], other[second] = pair
    elif isinstance(container, list):
        container.append(container[key])
    elif how == "rename":
        container[near(key, rng)] = container.pop(key)
    else:
        return replaced(value, container, Repeated(container))
    return value


def replaced(value: Any, old: Any, new: Any) -> Any:
    """Return `value` with the object `old` replaced by `new`."""
    if value is old:
        return new
    if isinstance(value, dict):
        return type(value)({k: replaced(x, old, new) for k, x in value.items()})
    return [replaced(x, old, new) for x in value] if isinstance(value, list) else value


def near(value: Any, rng: Random) -> Any:
    """Return a value of the same type that differs slightly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value)])
    if isinstance(value, str):
        if not value:
            return "x"
        at = rng.randrange(len(value))
        put = rng.choice(["", "x", "../", ".", "/", "\0", "é", value])
        return value[:at] + put + value[at + rng.choice([0, 1]) :]
    return wrong(rng) if value is None else [value]


def dump(value: Any) -> str:
    """Write JSON that may have NaN, escaped half characters and repeated keys."""
    if isinstance(value, Verbatim):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(k))}: {dump(x)}" for k, x in value.items()]
        pairs += pairs[-1:] if isinstance(value, Repeated) else []
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


# Of bytes, whatever they mean.


def flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), len(data) - 1, rng.randrange(16)])]


def splice(data: bytes, rng: Random) -> bytes:
    """Remove, repeat or overwrite a piece, or replace it with noise."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 4, 8, 100, 1000]))
    at = rng.randrange(len(data))
    piece = data[start:stop]
    return rng.choice(
        [
            data[:start] + data[stop:],
            data[:at] + piece + data[at:],
            data[:at] + piece + data[at + len(piece) :],
            data[:start] + rng.randbytes(len(piece)) + data[stop:],
            data + rng.randbytes(rng.choice([1, 8, 1000])),
            piece + data,
        ]
    )


def replace(data: bytes, rng: Random) -> bytes:
    """Replace the file with one of another kind."""
    return rng.choice([b"", b"{}", b"PK\x03\x04" + data, b"\x80\x04" + data, b"\0" * 4096, b"[]"])


# Of safetensors, at its parts.


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: Any, data: bytes) -> bytes:
    text = dump(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def header(data: bytes, rng: Random) -> bytes:
    value, rest = parts(data)
    return whole(edit_json(value, rng), rest)


def length(data: bytes, rng: Random) -> bytes:
    old = int.from_bytes(data[:8], "little")
    new = rng.choice([old + 1, old - 1, 0, 1, 2, 2**25 + 1, 2**40, 2**63, 2**64 - 1, len(data)])
    return new.to_bytes(8, "little") + data[8:]


def tensor(data: bytes, rng: Random) -> bytes:
    """Change a tensor's dtype, shape or position, often so that the sizes still agree."""
    value, rest = parts(data)
    names = [name for name in value if name != "__metadata__"]
    name = rng.choice(names)
    record = value[name]
    how = rng.choice(["dtype", "view", "flat", "reverse", "one", "offset", "drop", "zero", "swap"])
    if how == "dtype":
        record["dtype"] = rng.choice(["F16", "BF16", "I32", "U32", "F64", "F8_E4M3", "BOOL", "C64"])
    elif how == "view":  # four bytes an element as well
        record["dtype"] = rng.choice(["I32", "U32"])
    elif how == "flat":
        record["shape"] = [int(np.prod(record["shape"]))]
    elif how == "reverse":
        record["shape"] = record["shape"][::-1]
    elif how == "one":
        record["shape"] = [*record["shape"], 1]
    elif how == "offset":
        record["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 8, 10**12])
    elif how == "zero":
        record["shape"] = [0, *record["shape"]]
        record["data_offsets"] = [record["data_offsets"][0]] * 2
    elif how == "drop":
        del value[name]
    else:
        other = rng.choice(names)
        value[name], value[other] = value[other], value[name]
    return whole(value, rest)


def removed(data: bytes, rng: Random) -> bytes:
    """Remove a tensor from header and data consistently, or add one."""
    value, rest = parts(data)
    name = rng.choice([name for name in value if name != "__metadata__"])
    if rng.random() < 0.5:
        size = len(rest)
        value[near(name, rng)] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [size, size + 4],
        }
        return whole(value, rest + b"\0\0\x80\x3f")
    start, stop = value.pop(name)["data_offsets"]
    for record in (record for key, record in value.items() if key != "__metadata__"):
        if record["data_offsets"][0] >= stop:
            record["data_offsets"] = [n - (stop - start) for n in record["data_offsets"]]
    return whole(value, rest[:start] + rest[stop:])


def values(data: bytes, rng: Random) -> bytes:
    """Replace one value with NaN, infinity, or another number."""
    value, rest = parts(data)
    at = 4 * rng.randrange(len(rest) // 4)
    number = rng.choice([np.nan, np.inf, -np.inf, 3.0e38, 1e-40, 0.0, -7.5])
    return whole(value, rest[:at] + np.float32(number).tobytes() + rest[at + 4 :])


def another_tensor(data: bytes, rng: Random) -> bytes:
    """Give one or two tensors another name, shape or dtype, and rewrite the file consistently."""
    value, rest = parts(data)
    metadata = value.pop("__metadata__", None)
    tensors = [
        [name, record["dtype"], record["shape"], rest[slice(*record["data_offsets"])]]
        for name, record in value.items()
    ]
    for _ in range(rng.choice([1, 1, 2])):
        one = rng.choice(tensors)
        how = rng.choice(["shape"] * 3 + ["name", "name", "dtype", "copy", "drop", "values"])
        if how == "shape":
            one[1:] = "F32", *_zeros(rng)
        elif how == "name":
            one[0] = _another_name(one[0], rng)
        elif how == "dtype":
            one[1], itemsize = rng.choice(DTYPES)
            one[3] = rng.randbytes(int(np.prod(one[2])) * itemsize)
        elif how == "copy":
            tensors.append([_another_name(one[0], rng), *one[1:]])
        elif how == "values":
            value = np.float32(rng.choice([np.nan, np.inf, 3e38, -3e38, 1e-45, 1e30]))
            one[3] = (value.tobytes() * len(one[3]))[: len(one[3])]
        elif len(tensors) > 1:
            tensors.remove(one)
    header, content = {}, b""
    for name, dtype, shape, stored in tensors:
        offsets = [len(content), len(content) + len(stored)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += stored
    return whole({"__metadata__": metadata, **header} if metadata else header, content)


DTYPES = (("F16", 2), ("BF16", 2), ("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1))
DTYPES = (*DTYPES, ("I64", 8), ("U8", 1), ("U64", 8), ("BOOL", 1), ("C64", 8))


def _zeros(rng: Random) -> tuple[list[int], bytes]:
    shapes = [[], [0], [0, 3], [3, 0], [0, 0], [1], [2], [1, 1], [1, 1, 1], [2, 3, 4], [0] * 5]
    shape = rng.choice([*shapes, [1] * 20, [2**40, 0], [0, 2**62], [7, 2], [2, 7]])
    return shape, b"\0\0\x80\x3f" * int(np.prod(shape))


def _another_name(name: str, rng: Random) -> str:
    parts = name.split(".")
    others = [STEERING, name + STEERING, "y" * 1000, name + "\u202e", "é." + name, name.upper()]
    others += [".".join(parts[1:]), ".".join(parts[:-1]), parts[-1], "a." + name, name + ".weight"]
    others += [name.replace("0", "99999999999999999999"), name.replace("0", "-1"), name + ".0"]
    return rng.choice([x for x in others if x] + [near(name, rng)])


def nested(data: bytes, rng: Random) -> bytes:
    """Damage the JSON that is stored as text in the metadata."""
    value, rest = parts(data)
    metadata = value.get("__metadata__", {})
    texts = [key for key, text in metadata.items() if text[:1] in ("{", "[")]
    if not texts:
        return header(data, rng)
    key = rng.choice(texts)
    change = rng.choice([edit_json, lambda x, rng: known_fields.wrong_fields("", x, rng)])
    metadata[key] = dump(change(json.loads(metadata[key]), rng))
    return whole(value, rest)


def text(data: bytes, rng: Random) -> bytes:
    """Damage a file that is JSON itself."""
    return dump(edit_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def fields(name: str) -> "Edit":
    """Return the edit that puts wrong values into the fields of a JSON file of this name."""

    def wrong_fields(data: bytes, rng: Random) -> bytes:
        value = known_fields.wrong_fields(name, json.loads(data), rng)
        return dump(value).encode("utf-8", "surrogatepass")

    return wrong_fields


def rows(data: bytes, rng: Random) -> bytes:
    """Damage one line of a file of JSON lines."""
    lines = data.split(b"\n")
    at = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    change = rng.choice([text, fields("")])
    lines[at] = change(lines[at], rng)
    return b"\n".join(lines)


def tensors_of_gguf(data: bytes, rng: Random) -> bytes:
    """Damage a GGUF file at its parts."""
    parts = gguf_bytes.decode(data)
    gguf_bytes.mutate(parts, rng)
    return gguf_bytes.encode(parts)


FOLDERS = ("9" * 15, "9" * 30, "-1", "0", "007", "1e3", "3.0", "\u0663", "+5", "5 ", "a", "_6", "4")


def moved(files: Files, rng: Random) -> tuple[Files, str]:
    """Rename or copy a folder of the set, often to an absurd number."""
    name = rng.choice([name for name in sorted(files) if "/" in name])
    parts = name.split("/")
    depth = rng.randrange(len(parts) - 1)
    folder = "/".join(parts[: depth + 1]) + "/"
    to = "/".join([*parts[:depth], rng.choice(FOLDERS), ""])
    inside = {
        to + path.removeprefix(folder): files[path] for path in files if path.startswith(folder)
    }
    if rng.random() < 0.5:
        files = {path: data for path, data in files.items() if not path.startswith(folder)}
    return files | inside, f"{folder} becomes {to}"


Edit = Callable[[bytes, Random], bytes]
ANY: tuple[Edit, ...] = (flip, truncate, splice, replace)
TENSORS: tuple[Edit, ...] = (header, length, tensor, removed, values, nested)


def edits(path: str) -> tuple[Edit, ...]:
    """Return the edits for a file of this name; those that know its parts are more frequent."""
    name = path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return (*ANY, *TENSORS * 2, *[nested] * 4, *[another_tensor] * 12)
    if name.endswith(".gguf"):
        return (*ANY, *[tensors_of_gguf] * 24)
    if name.endswith(".jsonl"):
        return (*ANY, *[rows] * 16)
    if name.endswith(".json") or name in known_fields.FIELDS:
        return (*ANY, *(text, fields(name)) * 10)
    return ANY


def mutate(files: Files, rng: Random) -> tuple[Files, str]:
    """Damage one file of a set (rarely twice, or remove it); return the set, and how."""
    files = dict(files)
    name = rng.choice(sorted(files))
    if len(files) > 1 and rng.random() < 0.02:
        del files[name]
        return files, f"{name} missing"
    if "/" in name and rng.random() < 0.2:
        return moved(files, rng)
    edit = rng.choice(edits(name))
    files[name] = edit(files[name], rng)
    return files, f"{edit.__name__} of {name}"
