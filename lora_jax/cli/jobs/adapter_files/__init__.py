"""Commands that read adapter files and write other ones."""
