"""Quantizes weights to FP8 and measures the error; ModelOpt's quantizer state and activation quantizers."""
