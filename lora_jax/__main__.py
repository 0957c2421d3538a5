"""`python -m lora_jax`: the command line."""

import sys

from lora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
