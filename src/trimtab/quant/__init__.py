"""Numbers: grids, codebooks, codes and their bytes. No model is in sight."""
