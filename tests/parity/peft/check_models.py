"""Adapters both ways between lora_jax.models and transformers with peft: equal outputs.

    python -m tests.parity.peft.check_models [llama | llama_tied | mistral | qwen2 | bert ...]

needs torch, peft 0.21.2 and transformers (checked with 2.13 and 5.24), so the suite does not run
it. On every recorded model of tests/models/fixtures it

1. trains adapters here, saves them, and loads them with peft on the same torch model;
2. moves them there, saves them with peft, and loads them here;
3. merges, writes the model, and loads it with transformers;

and on tiny random models of transformers it

4. reads every kind of adapter that peft makes onto the Flax models, layers scanned or not;
5. loads every kind of adapter made here with peft.

peft must load with no warning, no missing and no unexpected key. Printed are the largest
differences of logits (BERT: of hidden states) from torch's.
"""

import dataclasses
import pathlib
import re
import sys
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as hugging_face
import torch
import transformers

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.files.disk import safetensors_file
from tests.models.recorded import EXPERTS, FIXTURES, MIXED
from tests.parity.peft import check_files
from tests.parity.peft.recorded.record_files import move

LIMIT = 1e-4
IDS = np.array([[3, 17, 5, 9, 11, 63, 1], [2, 5, 5, 3, 40, 41, 42]])
SEGMENTS = np.ones_like(IDS)

# --- the recorded models: trained, there and back, merged -----------------------------------------

KERNELS = r".*(query|key|value|output|gate|up|gate_up|down|intermediate)/kernel"
#: Name, stacked or not, and the configuration of the adapters.
CASES = (
    ("llama", False, lora.LoraConfig(rank=4, alpha=8)),
    ("llama", True, lora.LoraConfig(rank=4, alpha=8)),
    ("llama", True, lora.LoraConfig(rank=4, targets=KERNELS, dora=True)),
    ("llama", False, lora.LoraConfig(rank=3, targets=["query", "value"], scaling="rslora")),
    ("llama", True, lora.LoraConfig(rank=4, targets=KERNELS + "|(embedding|head)/.*")),
    ("llama_tied", False, lora.LoraConfig(rank=4, targets=KERNELS, bias="all")),
    ("llama_tied", True, lora.LoraConfig(rank=4, targets=KERNELS + "|embedding/.*")),
    ("mistral", True, lora.LoraConfig(rank=4, overrides={"query": {"rank": 2, "alpha": 3}})),
    ("qwen2", False, lora.LoraConfig(rank=4)),
    ("qwen2", True, lora.LoraConfig(rank=4, layers=[1])),
    ("qwen3", True, lora.LoraConfig(rank=4, train=["query_norm"])),
    ("gemma", False, lora.LoraConfig(rank=4, targets=KERNELS, dora=True)),
    ("gemma2", False, lora.LoraConfig(rank=4)),
    ("gemma2", True, lora.LoraConfig(rank=4, train=["attention_norm", "mlp_post_norm"])),
    ("gemma3_text", False, lora.LoraConfig(rank=4, targets=KERNELS, scaling="rslora")),
    ("gemma3_text", True, lora.LoraConfig(rank=4)),
    ("gemma3", True, lora.LoraConfig(rank=4)),
    ("phi3", False, lora.LoraConfig(rank=4)),
    ("phi3", True, lora.LoraConfig(rank=4, dora=True)),
    ("smollm3", True, lora.LoraConfig(rank=4)),
    ("olmo2", False, lora.LoraConfig(rank=4)),
    ("ministral", True, lora.LoraConfig(rank=4)),
    ("seed_oss", False, lora.LoraConfig(rank=4, targets=KERNELS, bias="all")),
    ("olmo3", True, lora.LoraConfig(rank=4)),
    ("exaone4", True, lora.LoraConfig(rank=4, train=["query_norm"])),
    ("granite", True, lora.LoraConfig(rank=4)),
    ("mixtral", False, lora.LoraConfig(rank=4, targets=KERNELS)),
    ("mixtral", True, lora.LoraConfig(rank=2, targets=["query", "down"])),
    ("qwen3_moe", True, lora.LoraConfig(rank=2, targets=KERNELS)),
    # PEFT 0.21 takes networks of layers without experts for experts: they are left out
    ("qwen3_moe_mixed", False, lora.LoraConfig(rank=2, targets=r".*(attention|experts)/.*kernel")),
    ("olmoe", True, lora.LoraConfig(rank=2, targets=KERNELS)),
    ("gpt_oss", False, lora.LoraConfig(rank=2, targets=["gate_up", "down", "output"])),
    ("gpt_oss", True, lora.LoraConfig(rank=2, targets=["query", "gate_up"])),
    ("bert", False, lora.LoraConfig(rank=4, targets=KERNELS)),
    ("bert", False, lora.LoraConfig(rank=4, targets=["query"], bias="adapted")),
)


def from_directory(source: pathlib.Path) -> transformers.PreTrainedModel:
    """Return the model in a directory, as transformers reads it."""
    kind = transformers.AutoModel if "bert" in str(source) else transformers.AutoModelForCausalLM
    return kind.from_pretrained(source, attn_implementation="eager").eval()


def torch_outputs(model: torch.nn.Module) -> np.ndarray:
    """Return logits, or BERT's hidden states."""
    with torch.no_grad():
        found = model(torch.asarray(IDS))
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


def trained(model: models.Pretrained, config: lora.LoraConfig) -> Any:
    """Return parameters with adapters after five steps of Adam towards random outputs."""
    params = lora.init(jax.random.key(0), model.params, config, model.apply, IDS, SEGMENTS)
    apply, tx = lora.lora(model.apply, on_dense="error"), lora.freeze(optax.adam(3e-2), params)
    goal = jax.random.normal(jax.random.key(1), (*IDS.shape, 1))

    @jax.jit
    def step(params, state):
        loss = lambda params: ((apply(params, IDS, SEGMENTS) - goal) ** 2).mean()
        updates, state = tx.update(jax.grad(loss, allow_int=True)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    return params


def in_peft(name: str, folder: str) -> torch.nn.Module:
    """Return the recorded model with the adapters in a folder, as PEFT loads them."""
    model = from_directory(FIXTURES / name)
    if name in (*EXPERTS, MIXED):  # whose tensors PEFT renames and joins
        return hugging_face.PeftModel.from_pretrained(model, folder).eval()
    return check_files.loaded(model, folder)


def there_and_back(name: str, scan: bool, config: lora.LoraConfig) -> tuple[float, ...]:
    """Return the differences: our adapters in peft, the change they make, peft's here, merged."""
    model = models.load(FIXTURES / name, scan=scan)
    params = trained(model, config)
    apply = jax.jit(lora.lora(model.apply, on_dense="error"))
    ours = np.asarray(apply(params, IDS, SEGMENTS))
    with tempfile.TemporaryDirectory() as folder:
        there, back, merged = (pathlib.Path(folder) / f"{x}_{name}" for x in ("a", "b", "c"))
        peft.save(there, params, model.naming, config=config)
        theirs = in_peft(name, str(there))
        outputs = torch_outputs(theirs)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "lora_" in key:
                    parameter += 0.05 * torch.randn_like(parameter)
        theirs.save_pretrained(back)
        base, _ = lora.split(params)
        # PEFT may have made parameters of all experts of what was modules of one
        names = safetensors_file.read(back / peft.TENSORS)[0]
        naming = model.family.naming(names) if name in (*EXPERTS, MIXED) else model.naming
        read = lora.join(base, peft.load(back, base, naming))
        returned = np.abs(apply(read, IDS, SEGMENTS) - torch_outputs(theirs)).max()
        plain = models.Pretrained(**vars(model) | {"params": lora.merge(params)})
        models.save(merged, plain, max_shard_size="20KB")
        written = np.abs(ours - torch_outputs(from_directory(merged))).max()
    change = np.abs(ours - np.asarray(model.apply(model.params, IDS, SEGMENTS))).max()
    return tuple(map(float, (np.abs(ours - outputs).max(), change, returned, written)))


def recorded_models(names: list[str]) -> float:
    """Print the table of `CASES`; return the largest difference."""
    print("model       layers    to peft  (change)  from peft  merged")
    worst = 0.0
    for name, scan, config in CASES:
        if name not in names:
            continue
        out, change, back, merged = there_and_back(name, scan, config)
        layers = "stacked" if scan else "single"
        print(
            f"{name:11} {layers:8} {out:8.1e}  {change:8.2f}   {back:8.1e} {merged:8.1e}",
            flush=True,
        )
        worst = max(worst, out, back, merged)
        assert change > 100 * LIMIT
    assert worst < LIMIT, worst
    return worst


# --- random models: every kind of adapter ---------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=8),
    "gemma2": transformers.Gemma2Config(**LLAMA, head_dim=8, sliding_window=4),
    "gemma3_text": transformers.Gemma3TextConfig(
        **LLAMA,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "phi3": transformers.Phi3Config(**LLAMA, pad_token_id=0),
    "bert": transformers.BertConfig(**SIZES),
}
LINEAR = ["q_proj", "v_proj", "down_proj"]
PEFTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR, "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "dora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "layers_to_transform": None},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17, 5]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}
BERTS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["query", "value"], "bias": "lora_only"},
    "dense": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "use_dora": True},
    "embedding": {"target_modules": ["word_embeddings", "key"]},
}
OURS = {
    "linear": lora.LoraConfig(rank=3, alpha=4, targets=["query/kernel", "value/kernel"]),
    "all-linear": lora.LoraConfig(rank=3, alpha=6, scaling="rslora"),
    "dora": lora.LoraConfig(rank=3, dora=True, targets=["query/kernel"]),
    "layers": lora.LoraConfig(rank=3, targets=["query/kernel"], layers=[0, 2]),
    "rows": lora.LoraConfig(rank=3, targets=["query/kernel"], rows={"embedding": [3, 5]}),
    "norms": lora.LoraConfig(rank=3, targets=["query/kernel"], train=["norm/scale"]),
}


#: The layers of `PEFTS` and `OURS` that Phi-3 has in others.
FUSED = {"q_proj": "qkv_proj", "v_proj": "gate_up_proj"}
FUSED |= {"query/kernel": "query_key_value/kernel", "value/kernel": "gate_up/kernel"}


def in_family(name: str, x: Any) -> Any:
    """Return the names of layers as a family has them, in a list or in a mapping."""
    if name != "phi3":
        return x
    if isinstance(x, lora.LoraConfig):
        return dataclasses.replace(x, targets=in_family(name, x.targets))
    if isinstance(x, dict):
        return {in_family(name, key): in_family(name, value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [in_family(name, one) for one in x]
    if not isinstance(x, str):
        return x
    return re.sub("|".join(FUSED), lambda found: FUSED[found[0]], x)


def random_model(name: str) -> torch.nn.Module:
    """Return one of `CONFIGS` with random parameters."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = transformers.BertModel(config) if name == "bert" else None
    model = model or transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.05 * torch.randn(x.shape))
    return model.eval()


def outputs(pretrained: models.Pretrained, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(lora.lora(pretrained.apply))(params, jnp.asarray(IDS), SEGMENTS))


def report(what: str, got: np.ndarray, want: np.ndarray, plain: np.ndarray) -> float:
    apart, moved = np.abs(got - want).max(), np.abs(want - plain).max()
    print(f"{apart:.1e}  (adapters move by {moved:.1e})  {what}", flush=True)
    assert apart < LIMIT < moved, what
    return float(apart)


def theirs(name: str, fields: dict[str, Any], loaded: list[models.Pretrained]) -> float:
    """Read an adapter of peft here."""
    config = hugging_face.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
    model = move(hugging_face.get_peft_model(random_model(name), config)).eval()
    want, plain, worst = torch_outputs(model), torch_outputs(random_model(name)), 0.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for pretrained in loaded:
            adapters = peft.load(folder, pretrained.params, pretrained.naming)
            got = outputs(pretrained, lora.join(pretrained.params, adapters))
            worst = max(worst, report(f"peft -> {name}", got, want, plain))
    return worst


def ours(name: str, config: lora.LoraConfig, pretrained: models.Pretrained) -> float:
    """Load an adapter made here in peft."""
    params = lora.init(
        jax.random.key(0), pretrained.params, config, pretrained.apply, jnp.asarray(IDS), SEGMENTS
    )
    base, adapters = lora.split(params)
    adapters = check_files.moved(adapters)
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, adapters, pretrained.naming, base=base, config=config)
        want = torch_outputs(check_files.loaded(random_model(name), folder))
    got = outputs(pretrained, lora.join(base, adapters))
    return report(f"{name} -> peft", got, want, torch_outputs(random_model(name)))


def random_models(names: list[str]) -> tuple[float, list[int]]:
    """Check every kind of adapter on `CONFIGS`; return the largest difference and the counts."""
    worst, counts = 0.0, [0, 0]
    for name in (name for name in CONFIGS if name in names):
        with tempfile.TemporaryDirectory() as folder:
            random_model(name).save_pretrained(folder)
            scans = (False,) if name == "bert" else (False, True)
            loaded = [models.load(pathlib.Path(folder), scan=scan) for scan in scans]
        for case, fields in (BERTS if name == "bert" else PEFTS).items():
            is_tied = CONFIGS[name].tie_word_embeddings and name != "bert"
            if ("tied" in case and not is_tied) or (case == "embedding" and is_tied):
                continue
            print(case, end=": ")
            worst = max(worst, theirs(name, in_family(name, fields), loaded))
            counts[0] += 1
        for case, config in OURS.items():
            for pretrained in loaded:
                print(case, end=": ")
                try:
                    worst = max(worst, ours(name, in_family(name, config), pretrained))
                except lora.TargetError as error:
                    print("skipped:", str(error).splitlines()[0])
                    continue
                counts[1] += 1
    return worst, counts


def main() -> None:
    every = list(dict.fromkeys([*(name for name, _, _ in CASES), *CONFIGS]))
    names = sys.argv[1:] or every
    if not set(names) <= set(every):
        raise SystemExit(f"models are {', '.join(every)}")
    warnings.simplefilter("error")
    for harmless in (".*is_gradient_checkpointing", ".*save_embedding_layers"):
        warnings.filterwarnings("ignore", harmless)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    recorded = recorded_models(names)
    print(f"trained, there and back, merged: {recorded:.1e} apart at most")
    worst, counts = random_models(names)
    print(f"{counts[0]} adapters of peft read, {counts[1]} written: {worst:.1e} apart at most")


if __name__ == "__main__":
    main()
