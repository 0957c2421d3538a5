"""The nouns: configuration, layouts, adapted weights and their algebra, paths and errors."""
