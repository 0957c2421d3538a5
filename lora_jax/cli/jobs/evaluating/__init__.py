"""What `lora-jax eval` measures, one module for each kind of data."""
