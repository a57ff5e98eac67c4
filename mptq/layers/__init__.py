"""The forward pass: megatron-core's transformer layer without Transformer Engine."""
