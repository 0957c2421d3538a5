"""The fuzzers beside transformers are no part of the suite: they need torch and transformers."""

collect_ignore_glob = ["*_configs/*.py"]
