"""GGUF, for llama.cpp: its files read and written code for code."""
