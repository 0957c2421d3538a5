"""Bytes on disk: whole or absent, checked, independent of what they mean."""
