"""Data that is larger than memory: read, tokenized and packed piece by piece while steps run.

`files` finds the files, `pieces` divides them and reads a piece, `stream` makes batches of them,
`counts` keeps what a resumed run needs to find its place.
"""
