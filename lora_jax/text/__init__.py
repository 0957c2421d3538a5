"""Text as models read it: token ids, chat templates, rows of packed texts."""
