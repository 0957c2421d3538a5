"""Measurements of a language model on files, apart from its loss."""
