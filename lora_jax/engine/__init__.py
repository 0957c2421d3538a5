"""The transformation `lora(fn)`: trace a program and run it with lazy adapted weights."""
