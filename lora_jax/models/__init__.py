"""Reference models in ordinary Flax that read real published weights."""
