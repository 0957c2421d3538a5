"""One module per command: the work it does once its options are read."""
