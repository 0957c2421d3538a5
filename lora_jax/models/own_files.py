"""The files in a model's directory that belong to the model, besides weights and config.json."""

import re
from pathlib import Path

_TOKENIZER = (
    *(r"tokenizer\.json", r"(tokenizer|added_tokens|special_tokens)(_config|_map)?\.json"),
    *(r"vocab\.(json|txt)", r"merges\.txt", r"normalizer\.json", r"bpe\.codes"),
    *(r"tokenizer\.model(\.v\d+)?", r"tekken\.json", r".+\.tiktoken"),
    *(r"(spiece|spm|sentencepiece|sentencepiece\.bpe)\.model", r"tokenization_\w+\.py"),
    r"chat_template\.(jinja|json)",
)
_OTHERS = (
    r"generation_config\.json",
    r"(pre|image_|video_pre)?processor(_config)?\.json",
    r"(modules|sentence_\w+_config|config_sentence_transformers)\.json",
    r"(configuration|modeling|processing|image_processing)_\w+\.py",  # code that the config names
    r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?",  # they apply to the merged model too
)


def read_own_files(directory: str | Path, adapter: str | Path | None = None) -> dict[str, bytes]:
    """Return a model's files by name: tokenizer, chat template, generation settings, licence.

    Weights, config.json and everything else, such as data beside the model, are left out.

    Args:
      directory: the model's.
      adapter: a directory whose tokenizer and chat template are used instead, if it has them.
    """
    own = _read(directory, (*_TOKENIZER, *_OTHERS))
    given = read_tokenizer_files(adapter) if adapter is not None else {}
    if given.keys() - {"chat_template.jinja", "chat_template.json"}:  # not parts of two tokenizers
        own = {name: data for name, data in own.items() if not _matches(name, _TOKENIZER)}
    return own | given


def read_tokenizer_files(directory: str | Path) -> dict[str, bytes]:
    """Return the files of the tokenizer and the chat template in a directory, by name."""
    return _read(directory, _TOKENIZER) if Path(directory).is_dir() else {}


def _read(directory: str | Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in sorted(Path(directory).iterdir())
        if _matches(file.name, patterns) and file.is_file()
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return re.fullmatch("|".join(patterns), name) is not None
