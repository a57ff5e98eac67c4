"""Re-reads an output: files, tensors, scales, configs, and every number against the source."""
