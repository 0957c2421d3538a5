"""Recording scripts need PyTorch and PEFT; the suite does not."""

collect_ignore_glob = ["record*.py", "*/record*.py"]
