"""Checkpoint formats: Hugging Face folders, safetensors, the hub and GGUF, read and written."""
