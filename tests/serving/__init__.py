"""The server: rows of one batch, their scheduler, and the HTTP interface."""
