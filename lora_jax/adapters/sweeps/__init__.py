"""Many adapters of one base trained in one compiled step: runs that differ in their settings."""
