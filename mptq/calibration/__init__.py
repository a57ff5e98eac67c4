"""Tokens, datasets, hidden states and what their difference says of the quantized model."""
