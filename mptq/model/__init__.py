"""The model: its config, and its tensors in Megatron, in checkpoints and in Hugging Face. No torch."""
