"""Formats that engines load, each written from the stored codes."""
