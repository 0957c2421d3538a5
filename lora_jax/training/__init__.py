"""Training adapters: rows of text, masks, packing, a compiled step, and a loop that can resume.

Each module is a step of it: `rows` reads a file, `examples` makes token ids of it, `data` makes
batches, `loss` and `step` train on one, `loop` goes through them. The model is any function
`(params, ids, segments) -> logits`.
"""
