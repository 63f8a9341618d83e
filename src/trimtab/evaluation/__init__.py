"""What a model is worth: perplexity, and whether trained, folded, saved and reloaded are the same model."""
