"""Adapters on disk: the native format, PEFT, mlx-lm and loralib, and the names they use."""
