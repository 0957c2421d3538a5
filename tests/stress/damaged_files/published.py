"""Damaged models and tokenizers: directories in Hugging Face's layout, and GGUF files."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.core.errors import ChatTemplateError, ModelFileError
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.models.text.turn_end import turn_end
from tests.cli import files as written
from tests.models.recorded import FIXTURES
from tests.stress.damaged_files import gguf_bytes
from tests.stress.damaged_files.command_line import files_of
from tests.stress.damaged_files.gguf_bytes import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32
from tests.stress.damaged_files.subject import Subject, Verdict, read_files

IDS = np.array([[1, 5, 3, 2], [4, 1, 1, 0]])
TEXT = "Hello 12 <s>é 日本\n"


def directory(name: str) -> Subject:
    """A recorded model of transformers."""
    files = read_files(FIXTURES / name)
    del files["expected.npz"]
    return Subject(files, _load_model, _judge_model)


def _load_model(path: Path) -> tuple[models.Pretrained, Any]:
    model = models.load(path)
    if model.kind in ("encoder", "decoder"):
        ids = jnp.asarray(IDS[:, : model.longest])
        inputs = {"ids": ids, "segments": jnp.ones_like(ids)}
    else:
        shapes = model.family.inputs(model.module)
        inputs = {name: jnp.ones(x.shape, x.dtype) for name, x in shapes.items()}
    return model, _forward(model.apply, model.params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _forward(apply: Any, params: Any, inputs: Any) -> Any:
    return apply(params, **inputs)


def _judge_model(loaded: tuple[models.Pretrained, Any], folder: Path) -> Verdict:
    model, found = loaded
    leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(model.params)]
    if not all(np.isfinite(x).all() for x in leaves):
        return "loads, not finite as stored", ""  # a model's values are its author's
    large = max((float(np.abs(x).max()) for x in leaves if x.size), default=0.0) > 1e6
    if not large and not np.isfinite(np.asarray(found, np.float32)).all():
        return "loads what it should not", f"outputs are not finite: {model.config}"
    return "loads", ""


def processor() -> Subject:
    """How a model's images become its pixels."""
    name = "preprocessor_config.json"
    files = {name: (FIXTURES / "vit" / name).read_bytes()}

    def load(folder: Path) -> Any:
        found = models.ImageProcessor.load(folder)
        if max(found.size) > 64:
            return np.zeros(1)
        return found(np.ones((1, *found.size, len(found.mean)), np.uint8))

    def judge(pixels: Any, folder: Path) -> Verdict:
        if np.isfinite(pixels).all():
            return "loads", ""
        return "loads what it should not", "pixels are not finite"

    return Subject(files, load, judge)


def gguf(part: str, architecture: str = "llama") -> Subject:
    """A small model with its tokenizer in one file, of which one part is read."""
    parts = _gguf_parts() if architecture == "llama" else _newer_parts(architecture)
    files = {"model.gguf": gguf_bytes.encode(parts)}

    def load_tokenizer(folder: Path) -> Any:
        return _use(Tokenizer.from_gguf(folder / "model.gguf"))

    if part == "tokenizer":
        return Subject(files, load_tokenizer, lambda loaded, folder: ("loads", ""))
    return Subject(files, lambda folder: _load_model(folder / "model.gguf"), _judge_model)


def _use(tokenizer: Tokenizer) -> Any:
    """Do what training and generation do with a tokenizer; some texts may have no ids."""
    try:
        return _used(tokenizer)
    except ModelFileError as error:
        if not str(error).startswith("the tokenizer cannot "):
            raise
        return None


def _used(tokenizer: Tokenizer) -> Any:
    ids = tokenizer.encode(TEXT, special=True)
    return (
        tokenizer.decode(ids),
        tokenizer.encode_batch([TEXT, ""]),
        "".join(tokenizer.stream(ids)),
        tokenizer.encode_spans(TEXT),
        tokenizer.encode_continued("Hello", " 12"),
        turn_end(tokenizer),
        len(tokenizer),
        (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id),
        _chat(tokenizer),
        tokenizer.files(),
    )


def _chat(tokenizer: Tokenizer) -> str | None:
    try:
        return tokenizer.chat([{"role": "user", "content": "hi"}])
    except ChatTemplateError:  # a program of others, in words of its own
        return None


def tokenizer(kind: str) -> Subject:
    """The tokenizer's files of a model: byte-level BPE, or one of the other kinds."""
    files = {n: x for n, x in files_of(written.model).items() if n.startswith("tokenizer")}
    if kind != "BPE":
        files["tokenizer.json"] = json.dumps(TOKENIZERS[kind]).encode()
        names = {f"{x}_token": token for x, token in (("bos", "<s>"), ("eos", "</s>"))}
        files["tokenizer_config.json"] = json.dumps(names).encode()
    return Subject(files, lambda folder: _use(Tokenizer.load(folder)), lambda *_: ("loads", ""))


_ADDED = [
    {"id": i, "content": token, "special": True}
    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, token in enumerate(("<unk>", "<s>", "</s>"))
]
_WORDS = ("<unk>", "<s>", "</s>", "▁", "▁Hello", "12", "H", "e", "l", "o", "##lo", "[UNK]")
_SPECIAL = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
TOKENIZERS: dict[str, Any] = {
    "Unigram": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _ADDED,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": _SPECIAL,
        },
        "decoder": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "always",
            "split": True,
        },
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [[word, -float(i)] for i, word in enumerate(_WORDS)],
            "byte_fallback": False,
        },
    },
    "WordPiece": {
        "version": "1.0",
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0}
        | {"direction": "Right"},
        "padding": None,
        "added_tokens": _ADDED,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True}
        | {"handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(_WORDS)},
        },
    },
}


def _gguf_parts() -> gguf_bytes.Parts:
    """Return a Llama of one layer, and a byte-level BPE with two merges."""
    tokens = ["<s>", "</s>", "H", "e", "l", "o", "He", "ll", *map(chr, range(0x100, 0x110))]
    width, inner, heads = 8, 12, 2
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), width),
        "output": (len(tokens), width),
        "output_norm": (width,),
        **{f"blk.0.attn_{x}": (width, width) for x in ("q", "output")},
        **{f"blk.0.attn_{x}": (width // 2, width) for x in ("k", "v")},
        **{f"blk.0.ffn_{x}": (inner, width) for x in ("gate", "up")},
        "blk.0.ffn_down": (width, inner),
        **{f"blk.0.{x}_norm": (width,) for x in ("attn", "ffn")},
    }
    draw = lambda shape: rng.normal(size=shape).astype(np.float32).tobytes()
    numbers = {
        "embedding_length": width,
        "feed_forward_length": inner,
        "block_count": 1,
        "context_length": 64,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "rope.dimension_count": width // heads,
    }
    return gguf_bytes.Parts(
        [
            ("general.architecture", STRING, "llama"),
            ("general.alignment", UINT32, 32),
            *((f"llama.{key}", UINT32, value) for key, value in numbers.items()),
            ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
            ("llama.rope.freq_base", FLOAT32, 10000.0),
            ("llama.rope.scaling.type", STRING, "linear"),
            ("llama.rope.scaling.factor", FLOAT32, 2.0),
            ("tokenizer.ggml.model", STRING, "gpt2"),
            ("tokenizer.ggml.pre", STRING, "smollm"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
            ("tokenizer.ggml.token_type", ARRAY, (INT32, [3, 3] + [1] * (len(tokens) - 2))),
            ("tokenizer.ggml.merges", ARRAY, (STRING, ["H e", "l l"])),
            ("tokenizer.ggml.bos_token_id", UINT32, 0),
            ("tokenizer.ggml.eos_token_id", UINT32, 1),
            ("tokenizer.ggml.add_bos_token", BOOL, True),
            ("tokenizer.chat_template", STRING, "{{ bos_token }}{{ messages[0].content }}"),
        ],
        [gguf_bytes.Tensor(f"{x}.weight", shape, draw(shape)) for x, shape in shapes.items()],
    )


def _newer_parts(architecture: str) -> gguf_bytes.Parts:
    """Return a Gemma 3 or a Phi-3 of one layer, and SentencePiece's BPE."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "H",
        "e",
        "l",
        "o",
        "He",
        "ll",
        "▁",
        *map(chr, range(97, 105)),
    ]
    tokens = list(dict.fromkeys(tokens))
    types = [2, 3, 3] + [1] * (len(tokens) - 3)
    width, inner, heads = 8, 12, 2
    norms = {"gemma3": ("attn", "ffn", "post_attention", "post_ffw"), "phi3": ("attn", "ffn")}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_down": (width, inner),
        **{f"blk.0.{x}_norm": (width,) for x in norms[architecture]},
    }
    if architecture == "gemma3":
        shapes |= {f"blk.0.attn_{x}": (rows, width) for x, rows in (("q", 8), ("k", 4), ("v", 4))}
        shapes |= {f"blk.0.attn_{x}_norm": (width // heads,) for x in ("q", "k")}
        shapes |= {f"blk.0.ffn_{x}": (inner, width) for x in ("gate", "up")}
    else:
        shapes |= {"blk.0.attn_qkv": (16, width), "blk.0.ffn_up": (2 * inner, width)}
        shapes |= {f"rope_factors_{x}": (2,) for x in ("long", "short")}
    rng = np.random.default_rng(0)
    draw = lambda shape: (1 + rng.random(size=shape)).astype(np.float32).tobytes()
    numbers = {
        "embedding_length": width,
        "feed_forward_length": inner,
        "block_count": 1,
        "context_length": 64,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.sliding_window": 4,
        "rope.dimension_count": width // heads,
        "rope.scaling.original_context_length": 16,
    }
    if architecture == "gemma3":
        numbers |= {"attention.key_length": 4, "attention.sliding_window_pattern": 6}
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}
    floats |= {"rope.freq_base_swa": 1000.0, "rope.scaling.attn_factor": 1.25}
    scores = [0.0, 0.0, 0.0, *(-float(i) for i in range(len(tokens) - 3))]
    return gguf_bytes.Parts(
        [
            ("general.architecture", STRING, architecture),
            *((f"{architecture}.{key}", UINT32, value) for key, value in numbers.items()),
            *((f"{architecture}.{key}", FLOAT32, value) for key, value in floats.items()),
            ("tokenizer.ggml.model", STRING, "llama"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
            ("tokenizer.ggml.token_type", ARRAY, (INT32, types)),
            ("tokenizer.ggml.scores", ARRAY, (FLOAT32, scores)),
            ("tokenizer.ggml.bos_token_id", UINT32, 1),
            ("tokenizer.ggml.eos_token_id", UINT32, 2),
            ("tokenizer.ggml.add_space_prefix", BOOL, architecture == "phi3"),
        ],
        [gguf_bytes.Tensor(f"{x}.weight", shape, draw(shape)) for x, shape in shapes.items()],
    )
