"""What the adapters cost on an accelerator: `python -m benchmarks.accelerator --help`."""
