"""Writers killed at random moments (SIGKILL): readers find either the old or the new, complete."""
