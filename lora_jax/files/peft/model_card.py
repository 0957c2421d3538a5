"""The model card of a PEFT adapter: README.md, as the Hugging Face Hub shows it.

Its front matter is what the Hub reads (base_model, library_name, tags, license, datasets); the rest
says what the adapter is and how to load it. A card ends in a comment with the SHA-256 of what is
before it. So a card that a person has changed, or written, is known as such and never replaced.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.foreign import shown
from lora_jax.files.disk.atomic import read_directory
from lora_jax.files.peft.config import PeftConfig

CARD = "README.md"
#: What the Hub calls the use of a model, and transformers' class, by PEFT's task type.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "SEQ_2_SEQ_LM": ("", "AutoModelForSeq2SeqLM"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MARK = "<!-- Written by lora_jax, which replaces this card while it is unchanged: "
_END = re.compile(re.escape(_MARK) + r"([0-9a-f]{64}) -->\n")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a person knows of an adapter, beside what its files say; all of it may be left out.

    Attributes:
      license: of the adapter, in the Hub's words: "apache-2.0", "mit", "other".
      datasets: the Hub's names of the data sets.
      language: the Hub's codes of the languages: "en".
      tags: more tags.
      data: the training data, in a few words.
      figures: figures of the training by name, such as {"held-out loss": 2.31}.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    data: str | None = None
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self, config: PeftConfig, parameters: int) -> str:
        """Return the text of the card.

        Args:
          config: of the adapter.
          parameters: how many numbers its tensors hold.
        """
        lines = ["---", *self._front_matter(config), "---", "", *self._body(config, parameters)]
        text = "\n".join(lines) + "\n\n"
        return f"{text}{_MARK}{_digest(text)} -->\n"

    def _front_matter(self, config: PeftConfig) -> Iterator[str]:
        """Yield the lines of YAML; a string or list in JSON is YAML too."""
        base, (pipeline, _) = _hub_id(config), _TASKS.get(config.task_type or "", ("", ""))
        tags = ["lora", "lora_jax", *([f"base_model:adapter:{base}"] if base else []), *self.tags]
        values = {
            "base_model": base,
            "library_name": "peft",
            "pipeline_tag": pipeline,
            "license": self.license,
            "language": list(self.language),
            "datasets": list(self.datasets),
            "tags": list(dict.fromkeys(tags)),
        }
        for name, value in values.items():
            if value:
                yield f"{name}: {json.dumps(value)}"

    def _body(self, config: PeftConfig, parameters: int) -> Iterator[str]:
        base = shown(config.base_model_name_or_path or "a base model that is not named")
        yield f"# A LoRA adapter of {_code(base)}"
        yield ""
        yield from _table({"base model": _code(base), **_facts(config, parameters)})
        trained = {"data": self.data} if self.data else {}
        trained |= {name: _figure(value) for name, value in self.figures.items()}
        if trained:
            yield from ("", "## Training", "")
            yield from _table(trained)
        yield from ("", "## Use", "", "In PyTorch, with transformers and PEFT:", "")
        yield from _code_block(_torch_use(config))
        yield from ("", "In JAX, with lora_jax:", "")
        yield from _code_block(_jax_use(config))


def may_replace_card(directory: Path) -> bool:
    """Return whether a directory has no card, or one that lora_jax wrote and nobody changed."""
    there = read_directory(directory, [CARD]).get(CARD) if directory.is_dir() else None
    return there is None or is_own(there)


def is_own(card: bytes) -> bool:
    """Return whether lora_jax wrote this card, and nobody has changed it since."""
    text = card.decode(errors="replace")
    end = _END.search(text)
    return end is not None and end.end() == len(text) and end[1] == _digest(text[: end.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hub_id(config: PeftConfig) -> str | None:
    """Return the base's name if the Hub would take it: not a path of this machine."""
    name = config.base_model_name_or_path
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _facts(config: PeftConfig, parameters: int) -> dict[str, str]:
    variant = " with ".join(
        ["rsLoRA" if config.use_rslora else "LoRA", *(["DoRA"] if config.use_dora else [])]
    )
    several = lambda one, pattern: f"{one:g}" + (f", others for {len(pattern)}" if pattern else "")
    facts = {
        "method": variant,
        "targets": _names(config.target_modules),
        "rank": several(config.r, config.rank_pattern),
        "alpha": several(config.lora_alpha, config.alpha_pattern),
        "dropout": f"{config.lora_dropout:g}",
        "trained in full": _names(config.modules_to_save),
        "parameters": f"{parameters:,}",
    }
    return {name: value for name, value in facts.items() if value}


def _names(names: Any) -> str:
    if not names:
        return ""
    if isinstance(names, str):
        return _code(shown(names))
    listed = sorted(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return ", ".join(_code(shown(name)) for name in listed[:12]) + more


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for name, value in rows.items():
        yield f"| {_cell(name)} | {_cell(value)} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _code_block(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```"]


def _torch_use(config: PeftConfig) -> list[str]:
    _, name = _TASKS.get(config.task_type or "", ("", "AutoModel"))
    base = json.dumps(config.base_model_name_or_path or "the base model")
    return [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"model = {name}.from_pretrained({base})",
        'model = PeftModel.from_pretrained(model, "this directory")',
    ]


def _jax_use(config: PeftConfig) -> list[str]:
    base = json.dumps(config.base_model_name_or_path or "the base model")
    return [
        "import lora_jax as lora",
        "from lora_jax import models, peft",
        "",
        f"model = models.load({base})  # a directory, such as `hf download` makes",
        'adapters = peft.load("this directory", model.params, model.naming)',
        "params = lora.join(model.params, adapters)",
        "apply = lora.lora(model.apply)",
    ]
