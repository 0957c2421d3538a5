"""The rows of data files: their forms, and the values in them."""
