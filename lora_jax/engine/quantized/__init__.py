"""Views of quantized weights: what happens to codes and scales, and where they are dequantized."""
