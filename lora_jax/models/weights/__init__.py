"""Weights of published models: where they lie on a mesh, and how they are written to files."""
