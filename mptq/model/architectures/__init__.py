"""The architectures of Hugging Face: a file for each, which registry.py lists."""
