"""The Megatron format: torch_dist with ModelOpt's state."""
