"""Random configurations of the decoders: computed as in transformers, or refused by name."""
