"""How leaves are merged: one at a time from files, or into codes."""
