"""Regular expressions of a configuration: what `re` says, in bounded time."""

import json
import random
import re
import time

import pytest

from lora_jax import AdapterFileError, peft
from lora_jax.errors import ConfigError
from lora_jax.peft import patterns
from lora_jax.peft.config import PeftConfig
from tests.peft.models import PLAIN
from tests.peft.models import base as tree

NAMES = [
    *(f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 2, 11) for x in "qkvo"),
    *(f"model.visual.blocks.{n}.mlp.{x}" for n in (0, 3) for x in ("fc1", "k_proj", "q_proj")),
    *("model.language_model.layers.0.mlp.gate_proj", "lm_head", "q_proj", "model.Layers.1.q", ""),
]
REAL = [
    r".*\.(q_proj|v_proj)$",
    r"model\.layers\.(0|1|2)\.self_attn\.(q|k|v)_proj",
    r"^(?!.*visual).*(q_proj|k_proj)$",
    r"^(model\.language_model(?=\.).*\.(q_proj|gate_proj))$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp|ffn).*?(?:k_proj|gate_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj)))",
    r"(?i)model\.layers\.\d+\.Q",
    r".*layers\.(?P<n>[0-9]|1[0-5])\..*(?<!o)_proj",
    r"(?:\w+\.)*q_proj",
    "lm_head|q_proj",
    "all-linear",
]
ATOMS = [
    *("a", "b", r"\.", ".", r"\d", "[ab]", "[^a]", r"\w", "1", "^", "$", r"\b", "_", r"\x61"),
    *("(?#no)a", "(?<=a)", "(?<!b)", "{", "}", "]", "[]a]", r"[\]b]", r"[^\W]"),
]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,3}", "{1,2}?", "{,}"]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_the_world(pattern):
    config = PeftConfig(target_modules=pattern)
    found = [config.targets(name) for name in NAMES]
    assert found == [re.fullmatch(pattern, name) is not None for name in NAMES]
    assert any(found) or pattern == "all-linear"


def draw(rng, depth):
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(ATOMS)
    one, two = (draw(rng, depth - 1) for _ in range(2))
    if kind < 0.55:
        return one + two
    if kind < 0.68:
        return f"({rng.choice(['', '?:'])}{one}|{two})"
    if kind < 0.76:
        return f"({rng.choice(['?=', '?!'])}{one})"
    return f"(?:{one}){rng.choice(REPEATS)}"


def test_random_patterns_say_what_re_says():
    rng, matched = random.Random(0), 0
    for _ in range(3000):
        pattern = rng.choice(["", "", "(?i)"]) + draw(rng, 4)
        text = "".join(rng.choice("aabB.1_\n{]") for _ in range(rng.randrange(7)))
        try:
            whole, start = re.fullmatch(pattern, text), re.match(pattern, text)
        except re.error:  # a comment repeated, as "(?:(?#no))*" is not
            continue
        patterns.check(pattern)
        assert patterns.fullmatch(pattern, text) == (whole is not None), (pattern, text)
        assert patterns.match(pattern, text) == (start is not None), (pattern, text)
        matched += whole is not None
    assert matched > 200


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", "(a?){60}a{60}$", "a?" * 60 + "a" * 60 + "b"],
)
def test_patterns_that_re_never_finishes(pattern):
    name = "a" * 60 + "!"
    start = time.perf_counter()
    config = PeftConfig(target_modules=pattern, rank_pattern={pattern: 2}, modules_to_save=["x"])
    assert not config.targets(name) and config.rank(name) == 8
    config = PeftConfig(target_modules=["q"], modules_to_save=[pattern])
    assert config.targets(f"{name}.q")
    assert time.perf_counter() - start < 5


NEST = "(" * 12 + "(?:a|b)*c?" + "){1,900}" * 12


def test_what_takes_too_long_is_an_error(tmp_path):
    config = PeftConfig(target_modules=NEST)
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=r"takes too long to match 'aaaa.*fewer repeats"):
        config.targets("a" * 300 + "!")
    assert time.perf_counter() - start < 5


def test_a_hostile_file_is_told_of_by_name(edited):
    folder = edited("linear", target_modules=NEST.replace("a|b", r"\w|\."))
    with pytest.raises(AdapterFileError) as caught:
        peft.load(folder, tree("plain"), PLAIN)
    assert str(caught.value).startswith(f"{folder / peft.CONFIG}: the regular expression '((((")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "(?P<n>a)(?P=n)", "(?>a)b", "a*+b", "(?i:a)", "(a)?(?(1)b|c)", r"(?x) a +"],
)
def test_what_is_not_read(pattern):
    re.compile(pattern)
    with pytest.raises(ConfigError, match="is not read here"):
        PeftConfig(target_modules=pattern)


def test_limits():
    for pattern, message in (
        ("(" * 60 + "a" + ")" * 60, "nested too deep"),
        ("a*" * 20_000, "40,000 characters"),
    ):
        with pytest.raises(ConfigError, match=message):
            PeftConfig(target_modules=pattern)
    many = {f"layers.{n}.*": 2 for n in range(101)}
    with pytest.raises(ConfigError, match="rank_pattern: has 101 regular expressions, and 100"):
        PeftConfig(rank_pattern=many)
    plain = {f"layers.{n}.q": 2 for n in range(3000)}
    assert PeftConfig(rank_pattern=plain).rank("h.layers.2999.q") == 2
    long = "|".join(rf"model\.layers\.{n}\.q" for n in range(3000))
    assert PeftConfig(target_modules=long).targets("model.layers.2999.q")
    with pytest.raises(ConfigError, match=r'layers_pattern: "h\*" has groups or repeats'):
        PeftConfig(layers_pattern="h*")
    with pytest.raises(ConfigError, match=r"rank_pattern: .* is not a regular expression"):
        PeftConfig(rank_pattern={"(?i)q": 2})  # PEFT has it within another, where it cannot be
    assert json.loads(PeftConfig(target_modules="(?i)q").to_json())["target_modules"] == "(?i)q"
