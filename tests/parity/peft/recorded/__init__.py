"""What PEFT computed, and the scripts that record it."""
