"""One module per primitive or family: how a lazy weight goes through it."""
