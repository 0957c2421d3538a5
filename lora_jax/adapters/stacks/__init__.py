"""Many adapters in one overlay: made, taken apart, and changed slot by slot."""
