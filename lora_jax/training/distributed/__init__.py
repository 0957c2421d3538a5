"""Training on several devices and in several processes; JAX moves the data."""
