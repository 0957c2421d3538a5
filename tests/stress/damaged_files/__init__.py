"""Adapter files damaged at random: each gives a clear error, or loads finite values that fit."""
