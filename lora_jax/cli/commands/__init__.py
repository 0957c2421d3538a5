"""One module per command: its options and help, light to import."""
