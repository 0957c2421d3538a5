"""Bytes on disk: written completely or not at all, and checked, whatever they mean."""
