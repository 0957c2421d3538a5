"""Files that are visited more or less often than once per epoch: `--data a.jsonl=2`."""
