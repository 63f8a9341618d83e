"""bitsandbytes' own 4-bit files."""
