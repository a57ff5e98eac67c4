"""Stage 1, read-only: indexes a checkpoint (without torch) and reads its tensors one at a time."""
