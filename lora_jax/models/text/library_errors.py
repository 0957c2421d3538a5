"""What the library `tokenizers` raises, as an error of ours."""

import contextlib
from collections.abc import Iterator

from lora_jax.core.errors import LoraError, ModelFileError
from lora_jax.core.foreign import shown

_PANIC = "PanicException"  # of its Rust code; not an `Exception`


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise `ModelFileError` in place of whatever `tokenizers` raises: it has no class for it.

    Args:
      what: what goes wrong then, with which the message starts.

    >>> with library_errors("the tokenizer cannot encode this text"):
    ...     raise Exception("Missing [UNK] token")
    Traceback (most recent call last):
    lora_jax.core.errors.ModelFileError: the tokenizer cannot encode this text: Missing [UNK] token
    """
    try:
        yield
    except LoraError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise ModelFileError(f"{what}: {shown(error)}") from error
