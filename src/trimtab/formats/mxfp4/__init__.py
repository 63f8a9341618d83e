"""Stacks of experts in MXFP4, as gpt-oss is published."""
