"""Calibration: token sequences, their hidden states between layers, and what the difference of two streams of them says."""
