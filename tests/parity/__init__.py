"""Adapter files of mlx-lm and loralib, recorded, and the scripts that recorded them."""
