"""What needs torch and transformers is no part of the suite."""

collect_ignore_glob = ["*.py"]
