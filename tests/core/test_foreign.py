"""Text of others in messages: nothing of it steers the terminal, and it stays short."""

import pickle
import unicodedata

import pytest

from lora_jax import AdapterFileError, ConfigError, LoraError
from lora_jax.core.foreign import MOST_OF_MESSAGE, escaped, for_terminal, shown, shown_value

CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
SEPARATORS = [0x2028, 0x2029]
SURROGATES = [0xD800, 0xDBFF, 0xDC00, 0xDFFF]
STEERING = [chr(n) for n in [*CONTROLS, *BIDI, *SEPARATORS, *SURROGATES, 0xFEFF, 0x200B]]


@pytest.mark.parametrize("mark", STEERING, ids=ascii)
def test_what_steers_a_terminal_is_escaped(mark):
    for text in (shown(f"a{mark}b"), str(LoraError(f"q{mark}k")).replace("\n", "")):
        assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)
        text.encode("utf-8")
    assert shown(f"a{mark}b") == f"a{ascii(mark)[1:-1]}b"


def test_letters_of_any_script_stay():
    text = "blöcke/注意/שכבה/слой_3/α×β–🙂 [0]"
    assert shown(text) == escaped(text) == text


@pytest.mark.parametrize("length", [1, 239, 240, 241, 100_000])
def test_a_long_name_keeps_both_ends(length):
    name = ("layers.0." + "x" * length + ".weight")[-length:]
    text = shown(name)
    assert len(text) < 300
    assert (text == name) == (length <= 240)
    if length > 240:
        assert text.startswith(name[:100]) and f"{name[-50:]} ({length:,} characters)" in text


def test_the_worst_of_a_name_stays_short():
    assert len(shown("\U000e0001" * 10**6)) < 3000


def test_an_error_escapes_its_message_and_is_short():
    error = AdapterFileError(
        "a\x1b[2J:\n" + "\n".join(f"{i}: \x07" + "y" * 300 for i in range(999))
    )
    lines = str(error).split("\n")
    assert lines[0] == "a\\x1b[2J:" and lines[-1].endswith(" characters)")
    assert all(line.isprintable() for line in lines)
    assert len(str(error)) < 1.1 * MOST_OF_MESSAGE


def test_an_error_survives_pickling():
    again = pickle.loads(pickle.dumps(ConfigError("rank\x00 is -1")))
    assert type(again) is ConfigError and str(again) == "rank\\x00 is -1"
    assert str(ConfigError()) == ""


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "make",
    [
        lambda: 10**4999,  # whose repr Python refuses
        Hostile,
        lambda: [[[]]] * 999,
        lambda: "\x1b" * 10**6,
        lambda: b"\0" * 999,
    ],
)
def test_the_repr_of_any_value_is_short(make):
    text = shown_value(make())
    assert text.isprintable() and len(text) < 700


def test_what_a_model_writes_keeps_its_letters_and_marks():
    text = "שלום\u200f 👩\u200d💻\u00a0\tx\r\n"
    assert for_terminal(text) == text.replace("\r", "\\r")
    controls = "".join(mark for mark in STEERING if unicodedata.category(mark) in ("Cc", "Cs"))
    assert for_terminal(controls).replace("\n", "").replace("\t", "").isprintable()
