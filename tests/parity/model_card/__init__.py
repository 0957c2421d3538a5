"""The model card of an adapter, read by huggingface_hub."""
