"""Complete programs built on lora_jax."""
