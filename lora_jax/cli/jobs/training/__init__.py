"""What `lora-jax train` does, and `sweep` with it: model, data, start, steps, results."""
