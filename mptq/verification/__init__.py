"""Verifies an output: files, tensors, scales, configs, and every value against the source."""
