"""Kinds of calibration data, one file a kind."""
