"""Tokens, datasets, hidden states, and the fidelity of the quantized model."""
