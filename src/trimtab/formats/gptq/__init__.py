"""GPTQ v2, for gptqmodel, transformers and vLLM."""
