"""Files of options with random damage, from the words of a run."""

import random

import yaml


def as_file(draw: random.Random, words: list[str]) -> bytes:
    """Return words as YAML with some damage."""
    values: dict[str, object] = {}
    place = 0
    while place < len(words):
        name = words[place].removeprefix("--")
        has_value = place + 1 < len(words) and not words[place + 1].startswith("--")
        value: object = words[place + 1] if has_value else True
        if name == "data":
            value = [*values.get("data", []), value]  # type: ignore[misc]
        values[name] = value
        place += 2 if has_value else 1
    for _ in range(draw.choice([0, 0, 1, 2])):
        key = draw.choice([*values])
        odd = (None, [], {}, {"a": 1}, [None], [[1]], True, 1, 1.5, "x", "", "é", float("inf"))
        values[key] = draw.choice(odd)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    for _ in range(draw.choice([0, 0, 1, 2])):
        text = draw.choice(_EDITS)(draw, text)
    data = text.encode("utf-8", "surrogatepass")
    return draw.choice(_BYTES)(data) if draw.random() < 0.2 else data


def _twice(draw: random.Random, text: str) -> str:
    return text + draw.choice(text.splitlines() or [""]) + "\n"


def _any(draw: random.Random, text: str) -> str:
    odd = (
        "\t",
        ": ",
        "- ",
        "#",
        "&a ",
        "*a",
        "!!int ",
        "{",
        "]",
        '"',
        "\n---\n",
        "<<: ",
        "%",
        "\x00",
    )
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(odd) + text[place:]


_EDITS = (
    _twice,
    _any,
    _any,
    lambda draw, text: text.replace("-", "_"),
    lambda draw, text: f"a: &x 1\n{text}",
    lambda draw, text: f"rank: &x 2\nalpha: *x\n{text}",
    lambda draw, text: f"learning_rate: 1\n{text}",
    lambda draw, text: f"train:\n  rank: 2\n{text}",
    lambda draw, text: f"? [a]\n: 1\n{text}",
    lambda draw, text: f"1: 2\n{text}",
    lambda draw, text: text.replace(":", ":\t", 1),
    lambda draw, text: f"- {text}",
    lambda draw, text: "",
)
_BYTES = (
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.decode("utf-8", "replace").encode("utf-16"),
    lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: data + b"\xff",
    lambda data: data[: len(data) // 2],
)
