"""`python -m lora_jax.cli`."""

from lora_jax.cli import entry

if __name__ == "__main__":
    entry()
