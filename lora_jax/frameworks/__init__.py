"""Adapted models that are models of their framework: Flax NNX and Equinox, imported only here."""
