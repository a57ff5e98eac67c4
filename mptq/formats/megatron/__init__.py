"""The Megatron format: a torch_dist checkpoint with ModelOpt state."""
