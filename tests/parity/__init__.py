"""Recorded numbers of PEFT, mlx-lm, loralib and PyTorch, and the scripts that recorded them."""
