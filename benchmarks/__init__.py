"""The cost of a training step, measured side by side: see docs/benchmarks.md."""
