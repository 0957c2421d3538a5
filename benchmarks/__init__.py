"""What a training step costs, measured side by side: see docs/benchmarks.md."""
