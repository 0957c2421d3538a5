"""Adapters of PyTorch libraries in memory, independent of the file format."""
