"""`python -m lora_jax`: the command line."""

from lora_jax.cli import entry

if __name__ == "__main__":
    entry()
