"""Results of papers, made again: `python -m benchmarks.published`; see ../README.md."""
