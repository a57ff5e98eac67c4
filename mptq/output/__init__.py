"""The output directory: complete or absent, resumable, with a manifest."""
