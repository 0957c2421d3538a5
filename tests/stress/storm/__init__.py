"""A storm of clients upon a server: `python -m tests.stress.storm`."""
