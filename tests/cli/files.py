"""Small adapters of every kind, written by hand: two layers with two projections each."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import lora_jax as lora
from lora_jax.files.contained_factors import read_factors
from lora_jax.files.disk import safetensors_file

ROOT = pathlib.Path(__file__).parents[2]
WIDTH, OUT, RANK, ALPHA = 12, 8, 4, 8
MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qv"]


def factors(seed=0):
    """{module: (A [in, rank], B [rank, out])} in float32."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {module: (draw(WIDTH, RANK), draw(RANK, OUT)) for module in MODULES}


def updates(path):
    """Return {module: ΔW [in, out]} of a file, in float64."""
    return {
        one.module: one.scale * one.a.astype(np.float64) @ one.b.astype(np.float64)
        for one in read_factors(path).factors
    }


def peft(directory, seed=0, config=(), extra=()):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors(seed).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.T
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.T
    safetensors_file.write(
        directory / "adapter_model.safetensors", tensors | dict(extra), {"format": "pt"}
    )
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    values |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "tiny"}
    (directory / "adapter_config.json").write_text(json.dumps(values | dict(config)))
    return directory


def mlx(directory, seed=0):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors(seed).items():
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
    safetensors_file.write(directory / "adapters.safetensors", tensors)
    values = {"fine_tune_type": "lora", "num_layers": 2, "model": "tiny"}
    values |= {"lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


def native(path, seed=0):
    """Write the same adapters for a base that stacks the layers."""
    made = factors(seed)
    base = {p: {"kernel": jnp.zeros((2, WIDTH, OUT))} for p in ("q_proj", "v_proj")}
    config = lora.LoraConfig(
        rank=RANK, alpha=ALPHA, targets=".*", overrides={".*": {"layout": "bio"}}
    )
    params = lora.init(jax.random.key(0), base, config)
    _, adapters = lora.split(params)
    for name in base:
        pairs = [made[f"model.layers.{n}.self_attn.{name}"] for n in range(2)]
        node = adapters[name]["kernel"]
        a, b = (jnp.stack([pair[i] for pair in pairs]) for i in range(2))
        scale = node.scale
        adapters[name]["kernel"] = lora.LoraWeight(None, a, b, scale, layout=node.layout)
    lora.save(path, adapters, {"model": "tiny"}, config=config)
    return path


SETTINGS = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260},
    **{"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": OUT // 2},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    **{"bos_token_id": 257, "eos_token_id": 258, "torch_dtype": "float32"},
}


def weights(seed=1):
    """Return a small Llama's tensors, with transformers' names and shapes."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (260, WIDTH), "lm_head": (260, WIDTH), "model.norm": (WIDTH,)}
    for n in range(2):
        shapes |= {
            f"model.layers.{n}.{name}": shape
            for name, shape in {
                **{f"self_attn.{p}_proj": (OUT, WIDTH) for p in "qkv"},
                "self_attn.o_proj": (WIDTH, OUT),
                **{f"mlp.{p}_proj": (16, WIDTH) for p in ("gate", "up")},
                "mlp.down_proj": (WIDTH, 16),
                **dict.fromkeys(["input_layernorm", "post_attention_layernorm"], (WIDTH,)),
            }.items()
        }
    return {
        f"{name}.weight": (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def model(directory, dtype=np.float32, **settings):
    """Write a directory in Hugging Face's layout, with a byte tokenizer and a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.astype(dtype) for name, x in weights().items()}
    safetensors_file.write(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(SETTINGS | settings))
    letters = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    settings = special | {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def gguf(path, eot=None):
    """Write the model as a GGUF file, with a byte tokenizer and the id of a turn's end."""
    from gguf import GGUFWriter  # not in every environment

    from tests.models.decoder.test_gguf import llama_cpp_name

    writer = GGUFWriter(path, "llama")
    for key, name in {
        **{"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"},
        **{"block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads"},
        **{"attention.key_length": "head_dim", "context_length": "max_position_embeddings"},
    }.items():
        writer.add_uint32(f"llama.{key}", SETTINGS[name])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<s>", "</s>", "<eot>"]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [1] * 257 + [3] * 3)
    writer.add_array("tokenizer.ggml.merges", ["t h"])
    for name, number in {"bos": 257, "eos": 258, "eot": eot}.items():
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in weights().items():
        writer.add_tensor(llama_cpp_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def naming(path):
    """Write the rows that name the modules of `native`'s tree, as a user would."""
    rows = [
        {
            "torch": f"model.layers.{{n}}.self_attn.{p}_proj.weight",
            "path": f"{p}_proj/kernel",
            "kind": "linear",
            "axes": "o i -> n i o",
        }
        for p in "qv"
    ]
    path.write_text(json.dumps(rows))
    return path


def everything(folder):
    """Write all files that the examples in the help name."""
    model(folder / "my-model")
    peft(folder / "my-adapter")
    mlx(folder / "my-mlx-adapter")
    native(folder / "adapter.safetensors")
    naming(folder / "naming.json")
    kohya(folder / "my-style.safetensors")
    (folder / "prompt.txt").write_text("Hello there\n")
    (folder / "play.txt").write_text(PLAY)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(3)]
    (folder / "held-out.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    classifier(folder)


def classifier(folder):
    """Write an encoder, labelled rows, and an adapter of peft with a classifier's head."""
    encoder(folder / "my-encoder")
    _labelled(folder / "reviews.jsonl")
    (folder / "my-classifier").mkdir()
    with np.load(ROOT / "tests" / "parity" / "peft" / "recorded" / "classifiers.npz") as recorded:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / "my-classifier" / name).write_bytes(recorded[f"bert/{name}"].tobytes())
    config = json.loads((folder / "my-encoder" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (folder / "my-encoder" / "config.json").write_text(json.dumps(config))


def _labelled(path):
    rows = [{"text": f"{word} {n}", "label": word} for n in range(5) for word in ("a", "b")]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


PLAY = "To be, or not to be, that is the question.\n" * 20


def train_data(folder):
    """Write what the examples of `train` name: data, and small models, so nothing is downloaded."""
    for name in ("smollm2", "llama-1b", "llama-8b"):
        model(folder / name, max_position_embeddings=512)
    encoder(folder / "MiniLM")
    for name in ("play.txt", "notes.txt"):
        (folder / name).write_text(PLAY)
    turns = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 10)
    _labelled(folder / "reviews.jsonl")
    row = {"prompt": "Say it", "chosen": " It", "rejected": " That"}
    (folder / "preferences.jsonl").write_text(f"{json.dumps(row)}\n" * 10)


def encoder(directory, kind="bert"):
    """Write a recorded encoder with more positions, and a tokenizer of a few words."""
    shutil.copytree(ROOT / "tests" / "models" / "fixtures" / kind, directory)
    tensors, metadata = safetensors_file.read(directory / "model.safetensors")
    for name in (name for name in tensors if "position_embeddings" in name):
        tensors[name] = np.tile(tensors[name], (8, 1))
        config = json.loads((directory / "config.json").read_text())
        config["max_position_embeddings"] = len(tensors[name])
        (directory / "config.json").write_text(json.dumps(config))
    safetensors_file.write(directory / "model.safetensors", tensors, metadata)
    words = ["[PAD]", "[UNK]", "a", "b", *map(str, range(10))]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(directory / "tokenizer.json"))


def kohya(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Write a file of kohya's for SD 1.5: a linear layer, a convolution, text and LyCORIS' LoHa."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    text = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    shapes = {
        f"{block}_attn2_to_k": ((2, 768), (320, 2)),
        "lora_unet_conv_out": ((1, 320, 3, 3), (4, 1, 1, 1)),
        text: ((1, 768), (768, 1)),
    }
    tensors = {}
    for name, (down, up) in shapes.items():
        tensors |= {f"{name}.lora_down.weight": draw(*down), f"{name}.lora_up.weight": draw(*up)}
        tensors[f"{name}.alpha"] = np.array(1.5, np.float32)
    name = f"{block}_attn1_to_q"
    for x, shape in {"w1_a": (320, 1), "w1_b": (1, 320)}.items():
        tensors |= {f"{name}.hada_{y}": draw(*shape) for y in (x, x.replace("1", "2", 1))}
    safetensors_file.write(path, tensors, {"ss_base_model_version": "sd_v1"})
    return tensors
