"""Random configurations of all models, and what transformers makes of them."""
