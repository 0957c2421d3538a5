"""The token that ends the assistant's turn in a chat template."""

from lora_jax.core.errors import ChatTemplateError
from lora_jax.models.text.tokenizer import Tokenizer

_ASKED, _ANSWERED, _THANKED = "Question0", "Answer0", "Thanks0"
_USER, _ASSISTANT = "user", "assistant"


def turn_end(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that the chat template writes after the assistant's words.

    Where the template writes none after the last turn but one before the next (it leaves the end
    to the following message), that one is returned.

    Returns:
      None without a chat template, or if ordinary text follows the assistant's words.
    """
    turns = [(_USER, _ASKED), (_ASSISTANT, _ANSWERED), (_USER, _THANKED)]
    messages = [{"role": role, "content": content} for role, content in turns]
    for count in (2, 3):
        try:
            text = tokenizer.chat(messages[:count])
        except ChatTemplateError:
            continue
        after = text.rpartition(_ANSWERED)[2].partition(_THANKED)[0].strip()
        if after and _ANSWERED in text:
            return _first_added_token(tokenizer, after)
    return None


def _first_added_token(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the id of the added token that a text starts with, if it starts with one."""
    added = tokenizer.backend.get_added_tokens_decoder()
    starting = {i: token for i, token in added.items() if text.startswith(token.content)}
    return max(starting, key=lambda i: len(starting[i].content), default=None)
