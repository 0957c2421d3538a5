"""Numbers of PEFT, mlx-lm, loralib and PyTorch, recorded; the scripts that recorded them."""
