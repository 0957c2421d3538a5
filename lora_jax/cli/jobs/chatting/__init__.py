"""A conversation of `lora-jax chat`: what was said, who speaks, and the commands in it."""
