"""The demonstration: fine-tune a real sentence encoder on real movie reviews.

`python -m lora_jax.demo` runs it.
"""
