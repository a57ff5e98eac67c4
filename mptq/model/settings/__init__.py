"""The sources of the architecture, each translated to megatron-core's settings."""
