"""Rounding that looks at the inputs of a linear: scales by their weighted error, and codes by GPTQ."""
