"""Skip the scripts that record and check: they need the other libraries, the suite does not."""

collect_ignore_glob = ["*/record_*.py", "*/check_*.py"]
