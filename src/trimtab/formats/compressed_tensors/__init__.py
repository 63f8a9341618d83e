"""compressed-tensors, for vLLM and transformers."""
