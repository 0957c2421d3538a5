"""A server of text completions: one base, many adapters, one batch of what arrives together."""
