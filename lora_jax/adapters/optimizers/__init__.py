"""Optimizers that update A and B of a weight together, because they know the one from the other."""
