"""Quantized weights: packed codes and scales that stand where a floating weight stood."""
