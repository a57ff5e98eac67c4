"""Stage 1, read only: what a checkpoint holds (without torch), and its tensors, one at a time."""
