"""adapter_config.json: what is rejected with which message, and PEFT's rules for names."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterFileError, peft
from lora_jax.core.errors import ConfigError
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming
from lora_jax.files.peft.config import REFUSED, PeftConfig, exact_pattern, parse_config
from lora_jax.files.peft.config_from_contents import alpha_of
from lora_jax.files.peft.tensor_names import part_of_name

MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}

WRONG = [
    ("r", 0),
    ("r", -3),
    ("r", "8"),
    ("r", 8.0),
    ("r", True),
    ("r", None),
    ("r", 10**40),
    ("lora_alpha", "16"),
    ("lora_alpha", 10**300),
    ("lora_alpha", False),
    ("target_modules", 3),
    ("target_modules", ["q", 3]),
    ("target_modules", {"q": 1}),
    ("exclude_modules", [None]),
    ("rank_pattern", {"q": 0}),
    ("rank_pattern", ["q"]),
    ("alpha_pattern", {"q": "1"}),
    ("use_rslora", 1),
    ("use_dora", "yes"),
    ("lora_bias", "false"),
    ("bias", "some"),
    ("bias", ["all"]),
    ("lora_dropout", 2),
    ("init_lora_weights", 1),
    ("modules_to_save", "head"),
    ("layers_to_transform", [-1]),
    ("layers_to_transform", "1"),
    ("layers_pattern", 4),
    ("trainable_token_indices", [1.5]),
    ("trainable_token_indices", {"emb": [True]}),
    ("task_type", 7),
    ("base_model_name_or_path", ["x"]),
]


def parse(**fields):
    return parse_config(json.dumps(MINIMAL | fields))


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_value_of_the_wrong_type_is_named(key, value):
    with pytest.raises(ConfigError) as caught:
        parse(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"{key} must be ") and len(message) < 300
    assert f", got {json.dumps(value)[:70]}" in message


def test_all_wrong_keys_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(r="8", bias="some", use_dora=2)
    assert [part.split()[0] for part in str(caught.value).split("; ")] == ["r", "use_dora", "bias"]


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_regular_expression_that_is_none(key):
    with pytest.raises(ConfigError, match=f'{key}: "\\(q" is not a regular expression'):
        parse(**{key: "(q"})
    with pytest.raises(ConfigError, match=r'rank_pattern: "\*\*" is not a regular expression'):
        parse(rank_pattern={"**": 2})


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_meaning_is_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"^{key} is .* not supported$"):
        parse(**{key: [[0, 4]]})
    assert parse(**{key: None}).others == {key: None}


@pytest.mark.parametrize(
    ("start", "name"),
    [("pissa", "PiSSA"), ("pissa_niter_4", "PiSSA"), ("OLoRA", "OLoRA"), ("corda", "CorDA")]
    + [("loftq", "LoftQ"), ("lora_ga", "LoRA-GA"), ("gaussian", None), (True, None)]
    + [(False, None), ("orthogonal", None), ("eva", None), ("mica", None)],
)
def test_starts_that_change_the_base_are_known(start, name):
    config = parse(init_lora_weights=start)
    assert (config.init_lora_weights, config.changes_base) == (start, name)


def test_unknown_keys_are_kept():
    config = parse(corda_config=None, new_in_another_version={"deep": [1, {"x": "y"}]})
    again = json.loads(config.to_json())
    assert again["new_in_another_version"] == {"deep": [1, {"x": "y"}]}
    assert again["corda_config"] is None and again["peft_type"] == "LORA"
    assert parse_config(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a mapping, got [1]"),
        (b"{}", "peft_type must be LORA, the only supported type, got null"),
        (b'{"peft_type": "LOHA"}', 'got "LOHA"'),
        (b'{"peft_type": ["LORA"]}', 'got ["LORA"]'),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        (b'{"peft_type": "LORA", "r": 1, "r": 2}', "'r' appears twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_configuration(text, message, tmp_path):
    (tmp_path / peft.CONFIG).write_bytes(text)
    with pytest.raises(AdapterFileError, match=re.escape(message)) as caught:
        peft.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / peft.CONFIG}: ")


def test_missing_files(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json: no such file"):
            peft.read_config(folder)


# --- PEFT's rules: the results are those of its own functions -------------------------------------


def test_ranks_and_scales_by_the_first_pattern_that_matches():
    config = parse(
        rank_pattern={"q": 2, "layers.0.q": 3, r"layers\.\d+\.up": 6},
        alpha_pattern={"^q": 1, "x.q": 3},
    )
    ranks = {name: config.rank(name) for name in ("q", "layers.0.q", "layers.1.up", "layers.1.aq")}
    assert ranks == {"q": 2, "layers.0.q": 2, "layers.1.up": 6, "layers.1.aq": 4}
    assert [config.scale(name) for name in ("q", "a.q", "x.q", "layers.2.up")] == [
        0.5,
        4,
        1.5,
        8 / 6,
    ]
    assert parse(use_rslora=True).scale("q") == 4.0


def test_targets():
    config = parse(target_modules=["q", "up"], exclude_modules=["1.q"], modules_to_save=["head"])
    found = [config.targets(x) for x in ("q", "a.q", "aq", "h.1.q", "h.11.q", "head.up", "a.up")]
    assert found == [True, True, False, False, True, False, True]
    assert [parse(target_modules=r"h\.\d\.q").targets(x) for x in ("h.1.q", "a.h.1.q")] == [1, 0]
    layers = parse(target_modules=["q"], layers_to_transform=[0, 2])
    assert [layers.targets(f"m.h.{n}.x.3.q") for n in range(3)] == [True, False, True]
    assert not layers.targets("m.q") and not layers.targets("h.0.q")
    named = parse(target_modules=["q"], layers_to_transform=3, layers_pattern="x")
    assert named.targets("m.h.1.x.3.q") and not named.targets("m.h.3.x.1.q")


def test_an_exact_pattern_matches_one_module():
    rng = np.random.default_rng(0)
    names = ["q", "a.q", "b.a.q", "a+b.q", "x[0].q", "a_q", "q.a", "axq", "b.axq", "layers.1.q"]
    for _ in range(20):
        some = list(rng.choice(names, 5, replace=False))
        for name in some:
            config = PeftConfig(rank_pattern={exact_pattern(name, some): 99})
            assert [x for x in some if config.rank(x) == 99] == [name]


@pytest.mark.parametrize("rank", [1, 3, 8, 48])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_is_the_number_that_was_meant(rank, rslora):
    for alpha in (1, 16, 0.1, 1 / 3, 1e-4, -2.5, 12345.678):
        scale = np.float32(alpha / (np.sqrt(rank) if rslora else rank))
        found = alpha_of(float(scale), rank, rslora)
        assert np.float32(found / (np.sqrt(rank) if rslora else rank)) == scale
        assert abs(found - alpha) < 1e-6 * abs(alpha) and (alpha == 1 / 3 or found == alpha)


def test_a_name_that_is_both_a_factors_and_a_weights():
    """An adapted module contains a module called lora_A."""
    known = {"x.weight", "x.lora_A.weight"}
    a, b = (f"base_model.model.x.lora_{c}.weight" for c in "AB")
    assert part_of_name(a, {a, b}, known) == ("x", "lora_A.weight")
    assert part_of_name(b, {a, b}, known) == ("x", "lora_B.weight")
    assert part_of_name(a, {a}, known) == ("x.lora_A.weight", "")
    both = known | {"x.lora_B.weight"}
    assert part_of_name(a, {a, b}, both) == ("x.lora_A.weight", "")
    assert part_of_name(a, {a, b}, known - {"x.weight"}) == ("x.lora_A.weight", "")
    assert part_of_name("x.lora_A.weight", (), known) is None
    old = "base_model.model.x.lora_magnitude_vector"
    assert part_of_name(old, (), known) == part_of_name(f"{old}.weight", (), known)


EXPERTS = [f"model.layers.{n}.experts.{e}.up" for n in range(3) for e in range(2)]


@pytest.mark.parametrize("pattern", [None, "experts", "layers", ["layers", "experts"]])
@pytest.mark.parametrize("chosen", [0, [1], [0, 2]])
def test_files_of_pefts_that_count_the_last_number(pattern, chosen, tmp_path):
    """PEFT 0.18 has the greedy expressions below, and adapts other modules than 0.21."""

    def older(name):
        found = re.match(r".*\.[^.]*\.(\d+)\.", name)
        for x in [pattern] if isinstance(pattern, str) else pattern or ():
            found = re.match(rf".*\.{x}\.(\d+)\.", name)
            if found:
                break
        return found and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)

    config = {"target_modules": ["up"], "layers_to_transform": chosen, "layers_pattern": pattern}
    newer = [name for name in EXPERTS if parse(**config).targets(name)]
    naming = Naming((Entry("{*m}.weight", "{*m}/kernel", "linear"),))
    base = {f"{name.replace('.', '/')}/kernel": jnp.zeros((3, 2)) for name in EXPERTS}
    for adapted in filter(None, (newer, [*filter(older, EXPERTS)])):
        one = {"A": np.ones((8, 3), "f4"), "B": np.ones((2, 8), "f4")}
        tensors = {f"base_model.model.{n}.lora_{x}.weight": one[x] for n in adapted for x in "AB"}
        safetensors_file.write(tmp_path / peft.TENSORS, tensors)
        (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8} | config))
        nodes = adapted_nodes(peft.load(tmp_path, base, naming))
        assert [path.removesuffix("/kernel").replace("/", ".") for path in nodes] == adapted
        given = peft.read_config(tmp_path)  # what is written means the same to both
        peft.save(tmp_path / "again", peft.load(tmp_path, base, naming), naming, config=given)
        written = peft.read_config(tmp_path / "again")
        for last in (False, True):
            found = [name for name in EXPERTS if written.targets(name, last_number=last)]
            assert found == adapted
    few = {name: x for name, x in tensors.items() if name.rpartition(".lora_")[0].endswith("1.up")}
    if few and len(few) < len(tensors):
        safetensors_file.write(tmp_path / peft.TENSORS, few)
        with pytest.raises(AdapterFileError, match="missing, but target_modules names the module"):
            peft.load(tmp_path, base, naming)


def test_whole_names_need_no_layer():
    """As in PEFT, where only an end of a name is bound to the layers."""
    config = parse(target_modules=["m.h.1.q", "v"], layers_to_transform=[0])
    assert config.targets("m.h.1.q") and config.targets("m.h.0.v") and not config.targets("m.h.1.v")
