"""A byte-level tokenizer for any text, without a file and without training."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lora_jax.models.text.tokenizer import Tokenizer

END = "<|end|>"
SPECIAL = (END, "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Create a tokenizer with one token per byte, and four special ones.

    >>> tokenizer = byte_tokenizer()
    >>> len(tokenizer), len(tokenizer.encode("né")), tokenizer.decode(tokenizer.encode("né"))
    (260, 3, 'né')
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {token: i for i, token in enumerate([*letters, *SPECIAL])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, eos=END, pad=END, chat_template=TEMPLATE)
