"""The architectures of Hugging Face that mptq writes."""
