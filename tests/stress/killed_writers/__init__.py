"""Writers killed at random moments (SIGKILL): readers find the old or the new, whole."""
