"""The modules that run: megatron-core's transformer layer without Transformer Engine."""
