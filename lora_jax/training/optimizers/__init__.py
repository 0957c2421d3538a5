"""The optimizers that adapters are trained with, by name."""
