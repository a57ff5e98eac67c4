"""What a model is: its config, its tensors in Megatron, in checkpoints and in Hugging Face. No torch."""
