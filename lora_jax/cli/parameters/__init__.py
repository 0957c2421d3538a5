"""What all commands do with their options: show them in groups, and read them from a file."""
