"""ModelOpt: quantize and compress a linear; and the FP8 arithmetic that measures and verifies the result."""
