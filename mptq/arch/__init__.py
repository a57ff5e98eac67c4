"""What a model is: its config, its names in Megatron and in Hugging Face, and one megatron-core layer of it."""
