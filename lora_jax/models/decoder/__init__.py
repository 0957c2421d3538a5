"""Decoders: one Flax module for all families, driven by its configuration."""
