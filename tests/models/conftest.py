"""The scripts that record need torch and peft; the suite does not."""

collect_ignore_glob = ["record*.py"]
