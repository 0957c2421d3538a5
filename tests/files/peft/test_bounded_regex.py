"""Regular expressions of a configuration: the results of `re`, in bounded time."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import AdapterFileError, ConfigError, peft
from lora_jax.files.naming import Entry, Naming
from lora_jax.files.peft import bounded_regex
from lora_jax.files.peft.config import PeftConfig

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
    r"(?i:model\.layers)\.\d+\.q",
    r".*layers\.(?P<n>[0-9]|1[0-5])\..*(?<!o)_proj",
    r"(?:\w+\.)*q_proj",
    "q|q_proj",
    "lm_head|q_proj",
]
ENDLESS = ["(x|a|b|ab)+$", "x?((a|b|ab)*c?){1,900}x"]
NAME = "x" + "ab" * 200 + "!"


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_the_world(pattern):
    config = PeftConfig(target_modules=pattern, rank_pattern={pattern: 3}, r=8)
    found = [config.targets(name) for name in NAMES]
    assert found == [re.fullmatch(pattern, name) is not None for name in NAMES]
    assert any(found)
    ranks = [re.match(rf"(.*\.)?({pattern})$", name) is not None for name in NAMES]
    assert [config.rank(name) == 3 for name in NAMES] == ranks


def test_flags_are_those_of_the_whole_expression():
    """PEFT matches target_modules as it is: a comment at its end ends the expression."""
    for pattern in (r"(?x) .* q_proj  # the query", r"(?i).*Q_PROJ"):
        config = PeftConfig(target_modules=pattern)
        found = [config.targets(name) for name in NAMES]
        assert found == [re.fullmatch(pattern, name) is not None for name in NAMES] and any(found)


@pytest.mark.parametrize("pattern", ["(?x) q  # the query", r"(a)(b)\2"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_what_cannot_be_within_pefts_expression_is_told_by_its_field(field, pattern):
    r"""`re` refuses both within `(.*\.)?(...)$`, where PEFT puts them."""
    with pytest.raises(re.error):
        re.compile(rf"(.*\.)?({pattern})$")
    with pytest.raises(ConfigError, match=rf"^{field}: .* is not a regular expression \(.*within"):
        PeftConfig(**{field: {pattern: 3}})


def test_a_comment_in_the_name_of_a_layer():
    with pytest.raises(ConfigError, match=r"^layers_pattern: "):
        PeftConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=["(?x) h # h"])


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(bounded_regex, "SECONDS", 0.05)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_takes_too_long_is_an_error(pattern, impatient):
    for config, ask in (
        (PeftConfig(target_modules=pattern), PeftConfig.targets),
        (PeftConfig(rank_pattern={pattern: 2}), PeftConfig.rank),
    ):
        with pytest.raises(ConfigError, match=r"too long to match 'xabab.*without nested repeats"):
            ask(config, NAME)


def test_a_hostile_file_is_told_of_by_name(tmp_path, impatient):
    naming = Naming((Entry(f"{NAME}.weight", "w", "linear"),))
    base = {"w": jnp.ones((3, 4))}
    adapters = lora_jax.split(lora_jax.init(jax.random.key(0), base, lora_jax.LoraConfig(1)))[1]
    peft.save(tmp_path / "a", adapters, naming, base=base)
    file = tmp_path / "a" / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {ENDLESS[0]: 2}}))
    with pytest.raises(AdapterFileError) as caught:
        peft.load(tmp_path / "a", base, naming)
    assert str(caught.value).startswith(f"{file}: the regular expression '")
    assert ENDLESS[0] in str(caught.value) and "takes too long" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
