"""Dense safetensors in transformers' layout."""
