"""The algebra of adapters: combine several into one, change ranks, find intruder dimensions."""
