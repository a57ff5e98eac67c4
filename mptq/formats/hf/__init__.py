"""The Hugging Face format: safetensors, config.json, tokenizer."""
