"""A tokenizer from GGUF metadata: byte-level BPE (https://arxiv.org/abs/1508.07909), or pieces."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lora_jax.core.errors import ModelFileError
from lora_jax.models.text.gguf_pieces import from_pieces

# How text is split before merges, under the names in llama.cpp's src/llama-vocab.cpp.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "llama-bpe": _WORDS % r"\p{N}{1,3}" + _SPACES,
    "qwen2": _WORDS % r"\p{N}" + _SPACES,
}
_DIGITS = ("smollm", "starcoder", "refact", "command-r")  # each digit alone, then like GPT-2
_GPT2 = ("gpt-2", "default")
_CONTROL, _USER_DEFINED = 3, 4
_KINDS = ("gpt2", "llama")


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that `tokenizer.ggml.*` describes.

    Raises:
      ModelFileError: it is another kind, splits text in an unknown way, or its parts do not fit
        together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ModelFileError(
            f"tokenizer.ggml.model is {kind!r}, but only {' and '.join(map(repr, _KINDS))} "
            "(byte-level BPE and SentencePiece's BPE) are supported; put the model's "
            "tokenizer.json into the same directory"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = list(metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ModelFileError(
            f"{len(types)} token types for {len(set(tokens))} different of {len(tokens)} tokens"
        )
    if kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = from_pieces(tokens, types, scores, space_prefix=prefix)
        metadata = {"tokenizer.ggml.add_bos_token": True, **metadata}  # as in llama.cpp
    else:
        tokenizer = _byte_level(metadata, tokens)
    of_kind = lambda kind: [
        AddedToken(token, normalized=False)
        for token, its in zip(tokens, types, strict=True)
        if its == kind
    ]
    tokenizer.add_special_tokens(of_kind(_CONTROL))
    tokenizer.add_tokens(of_kind(_USER_DEFINED))
    _add_ends(tokenizer, metadata, tokens)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pairs = [_pair(merge) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    cut = metadata.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe")
    except Exception as error:  # tokenizers raises nothing more precise
        raise ModelFileError(
            f"tokens and merges of tokenizer.ggml are not a BPE vocabulary: {error}"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token(metadata: Mapping[str, Any], name: str) -> str | None:
    """Return the token with the id `tokenizer.ggml.{name}_token_id`, or None without one."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ModelFileError(f"{key} is not a list of strings")
    return value


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    if not first or not second or " " in second:
        raise ModelFileError(f"{merge!r} in tokenizer.ggml.merges does not name two tokens")
    return first, second


def _pre_tokenizer(cut: Any) -> Any:
    if cut in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    first: Any
    if cut in _DIGITS:
        first, rest = pre_tokenizers.Digits(individual_digits=True), True
    elif cut in _CUTS:
        first, rest = pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated"), False
    else:
        known = ", ".join((*_GPT2, *_DIGITS, *_CUTS))
        raise ModelFileError(f"tokenizer.ggml.pre {cut!r} is not supported, only {known}")
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rest)]
    )


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Let `encode` add the tokens that the file asks for before and after a text."""
    ends = {
        name: content
        for name in ("bos", "eos")
        if metadata.get(f"tokenizer.ggml.add_{name}_token")
        and (content := token(metadata, name)) is not None
    }
    if ends:
        parts = [ends.get("bos"), "$A", ends.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part],
            special_tokens=[(content, tokens.index(content)) for content in ends.values()],
        )
