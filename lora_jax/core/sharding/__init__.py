"""Meshes: arrays whose type says how they are sharded, and where the arrays of adapters lie."""
