"""LoRA checkpoints of other JAX trainers, beside the trainers' own modules."""
