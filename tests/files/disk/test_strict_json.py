"""JSON as files have it: what no field can mean is refused where it is read."""

import json
import re

import pytest

from lora_jax import AdapterFileError, ConfigError
from lora_jax.files.disk.strict_json import parse_json

REFUSED = {
    "5,000 digits": ("9" * 5000, "beyond what a float can hold"),
    "a negative one": ("-" + "9" * 5000, "beyond what a float can hold"),
    "400 digits": ("1" + "0" * 400, "beyond what a float can hold"),
    "with its key": ('{"a": [{"r": 1e400}]}', "'r': the number 1e400 is beyond"),
    "1e400": ("1e400", "the number 1e400 is beyond"),
    "-1e999": ("[-1e999]", "the number -1e999 is beyond"),
    "NaN": ("[NaN]", "NaN is not a JSON number"),
    "infinity": ("-Infinity", "-Infinity is not a JSON number"),
    "half a pair": ('"\\ud800"', "surrogates not allowed"),
    "twice": ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "bytes": (b"\xff{}", "can't decode byte 0xff"),
    "no value": ("", "Expecting value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    text, message = REFUSED[name]
    with pytest.raises(AdapterFileError, match=rf"^x\.json: .*{re.escape(message)}") as error:
        parse_json(text, "x.json")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["1000000000000000019884624838656", "1e308", "-9223372036854775808", "1e-400", "[0, -0.0]"],
)
def test_numbers_that_a_float_can_hold(text):
    assert parse_json(text, "x.json") == json.loads(text)
    assert parse_json("\ufeff" + text, "x.json") == json.loads(text)  # a byte order mark


def test_the_class_of_the_error():
    with pytest.raises(ConfigError, match="not valid JSON"):
        parse_json("{", "x.json", ConfigError)
