"""The run: one transformer layer after another is read, calibrated, quantized, written and freed."""
