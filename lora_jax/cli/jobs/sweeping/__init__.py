"""What `lora-jax sweep` does."""
