"""Hugging Face architectures: one file per family, all listed in registry.py."""
