"""Results of papers, reproduced: `python -m benchmarks.published`; see docs/benchmarks.md."""
