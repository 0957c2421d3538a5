"""Fine-tune a published sentence encoder on real movie reviews with `lora_jax.training`.

`python -m examples.sentiment` runs it.
"""
