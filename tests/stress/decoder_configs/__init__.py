"""Random configurations of the decoders: transformers must compute the same, or an error say why."""
