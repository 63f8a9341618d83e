"""Models: loading, preparing and folding them, and the bridge to transformers."""
