"""Where the architecture is known from, in megatron-core's words."""
