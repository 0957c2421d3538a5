"""What a run measures, for the tools that people watch runs with."""
