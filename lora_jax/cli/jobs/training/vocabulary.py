"""More tokens for the model that is trained, and an output head apart from its embedding."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken

from lora_jax import models
from lora_jax.core.foreign import shown
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.text import Tokenizer
from lora_jax.training.errors import TrainingError


@dataclass(frozen=True)
class Vocabulary:
    """What `--add-token` and `--untie-head` ask for.

    Attributes:
      tokens: texts that become one token each.
      untie: whether the output head gets its own values.
    """

    tokens: Sequence[str] = ()
    untie: bool = False

    def extend(self, tokenizer: Tokenizer) -> None:
        """Add the tokens to a tokenizer.

        Raises:
          TrainingError: a text is empty, or a token already.
        """
        for text in self.tokens:
            if not text.strip():
                raise TrainingError("--add-token: the text is empty")
            if tokenizer.backend.token_to_id(text) is not None:
                raise TrainingError(
                    f"--add-token {shown(text)}: the tokenizer has this token already; leave it out"
                )
            tokenizer.backend.add_tokens([AddedToken(text, normalized=False)])

    def apply(self, model: Pretrained, tokenizer: Tokenizer) -> Pretrained:
        """Return the model with an embedding for each token, and with the head asked for.

        Raises:
          ConfigError: the head is not tied.
        """
        if self.untie:
            model = models.untie_head(model)
        needed = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
        if self.tokens and needed > model.config.vocab_size:
            model = models.resize_vocabulary(model, needed)
        return model

    def whole(self, model: Pretrained) -> tuple[str, ...]:
        """Return the paths of the leaves to train in full: PEFT saves these as they are."""
        found = ["/".join(model.family.embedding)] if self.tokens else []
        if "head" in model.params and (self.tokens or self.untie):
            found.append("head/kernel")
        return tuple(found)
