"""Random options, files of options and data for `lora-jax train`: how each run ends."""
