"""GGUF adapters beside llama.cpp itself."""
