"""Kinds of calibration data, one file per kind."""
